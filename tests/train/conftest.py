"""transformers is only a reference here: it must never ask the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
