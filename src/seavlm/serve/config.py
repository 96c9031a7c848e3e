"""The server's YAML files, read and checked."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from seavlm.errors import SeavlmError

Model = TypeVar("Model", bound=BaseModel)


def read(model: type[Model], path: Path, hint: str) -> Model:
    """SeavlmError, in one line, for what cannot be read or does not fit."""
    try:
        return model.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except OSError as error:
        raise SeavlmError(f"{path} cannot be read ({error.strerror})", hint="Check the path.") from None
    except yaml.YAMLError as error:
        raise SeavlmError(f"{path} is not YAML: {' '.join(str(error).split())[:200]}") from None
    except ValidationError as error:
        first = error.errors()[0]
        said = str(first["msg"]).removeprefix("Value error, ")
        told = ": ".join([str(path), *filter(None, [".".join(map(str, first["loc"])), said])])
        raise SeavlmError(told, hint=hint) from None
