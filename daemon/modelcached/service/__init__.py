"""gRPC faces: translate, never decide."""
