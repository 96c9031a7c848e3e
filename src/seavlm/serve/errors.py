"""Errors in OpenAI's form."""

from __future__ import annotations

import json
from typing import Any

from starlette.responses import Response

from seavlm.errors import SeavlmError

RETRY_AFTER = 2  # seconds
_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}


class Refused(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, **headers: str
    ) -> None:
        self.status, self.headers = status, {name.replace("_", "-"): value for name, value in headers.items()}
        kind = _KINDS.get(status) or ("invalid_request_error" if status < 500 else "server_error")
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    @classmethod
    def of(cls, error: SeavlmError) -> Refused:
        """Of an error of the engine: what the model did is our fault, what was asked is the caller's."""
        ours = "not finite" in str(error) or error.__cause__ is not None
        return cls(500 if ours else 400, str(error))

    @classmethod
    def unfit(cls, errors: Any) -> Refused:
        """Of pydantic's first complaint."""
        first = errors[0]
        at = ".".join(str(part) for part in first["loc"] if part != "body")[:200]  # keys are the client's
        message = str(first["msg"]).removeprefix("Value error, ")
        if not at and first["type"] == "model_attributes_type":
            message = "Send a JSON object, and Content-Type: application/json."
        return cls(400, f"{at}: {message}" if at else message, param=at or None)

    @classmethod
    def unserved(cls, why: str) -> Refused:
        return cls(503, why, Retry_After=str(RETRY_AFTER))

    def answer(self) -> Response:
        return Response(json.dumps(self.body), self.status, self.headers, "application/json")
