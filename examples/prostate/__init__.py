"""Semi-supervised segmentation of the prostate across sites: data, synthetic sites, commands."""
