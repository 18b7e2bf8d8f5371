"""Devices, meshes and placement: the only place that imports `jax.sharding`."""
