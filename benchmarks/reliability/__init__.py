"""Long forms of the reliability scorecard's lines about the server, each with its control."""
