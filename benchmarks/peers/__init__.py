"""tokenmill and its peers on the same model, in turns, in one run; see docs/peers.md."""
