"""Attention in parts: over aligned spans of positions, merged by one fixed binary tree."""
