"""Meshes, sharding rules, programs, processes and compiled programs kept on disk."""
