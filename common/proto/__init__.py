"""The protobuf schema of what travels. `make proto` regenerates the Python from wardround.proto."""
