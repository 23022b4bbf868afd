"""Cerebral aneurysms in rotational angiograms: train at some centres, test at another."""
