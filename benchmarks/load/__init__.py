"""The load generator against others, and the endpoint that both are tested on."""
