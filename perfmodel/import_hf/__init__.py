"""Turn a Hugging Face config.json into a Model, without network and without transformers.

Each family of architectures registers one reader, a function from the configuration (a `Config`) to the
fields of a Model; a new architecture is one function in one file of this package.
"""

from __future__ import annotations

from perfmodel.import_hf.reader import Config, family, from_catalog, from_config, read

__all__ = ["Config", "family", "from_catalog", "from_config", "read"]
