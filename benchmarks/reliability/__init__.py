"""Lines of the reliability scorecard that need a running server; each is a command with a control."""
