"""Semi-supervised segmentation across sites: few labels at one site, none at the others.

The trainer, methods and commands that `examples.prostate` and `examples.fundus.semi` share. Data
and recipe are those of MiDSS (Ma et al., https://arxiv.org/abs/2404.08951) where nothing else is
said.
"""
