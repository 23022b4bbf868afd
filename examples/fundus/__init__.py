"""Optic disc and cup in fundus photographs: train a source model, adapt it at test time."""
