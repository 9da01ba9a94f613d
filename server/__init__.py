"""The coordinator: ServerApp, roster, round loop, strategy adapter, checkpoints."""
