"""What serving over HTTP adds to the engine: throughput of many streams, and time to the first token."""
