"""What the Makefile calls: small programs that are no part of the package."""
