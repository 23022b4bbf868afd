"""Example trainers: gradkit on medical images."""
