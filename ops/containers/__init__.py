"""What runs in the images of docker/Dockerfile: one module for each container of compose.yaml."""
