"""A run: its folder, its checkpoints, its pictures and its speed."""
