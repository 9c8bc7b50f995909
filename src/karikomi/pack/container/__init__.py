"""The container: a strict safetensors header, and the manifests of the versions of the format."""
