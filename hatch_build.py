"""Put the data folders that have files into the wheel, under perfmodel/_catalog, where `catalog.root` finds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

KINDS = ("hardware", "models", "papers", "reports", "techniques")


class CatalogHook(BuildHookInterface):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """An editable install reads the folders of the checkout and needs no copy."""
        if version == "editable":
            return
        for kind in KINDS:
            folder = Path(self.root, kind)
            if any(path.is_file() for path in folder.rglob("*")):
                build_data["force_include"][str(folder)] = f"perfmodel/_catalog/{kind}"
