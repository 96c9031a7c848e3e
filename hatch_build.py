"""The package's build compiles the CPU kernels. Without a C++ compiler it goes on without them."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class Kernels(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        path = Path(self.root, "src", "seavlm", "engine", "kernels", "build.py")
        spec = importlib.util.spec_from_file_location("kernels_build", path)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        try:
            made = module.build()
        except RuntimeError as error:
            self.app.display_warning(f"seavlm is built without its CPU kernels: {error}")
            return
        build_data["artifacts"] += [str(one.relative_to(self.root)) for one in made]
        # Any Python 3 can load them, but only on such a machine.
        machine = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{machine}"
