"""From an image to its label: a head, the identity of its network, and the file of both.

In: images or features. Out: labels and calibrated probabilities; exported models.
Here: the predictor, its file, predictions, grafting, export.
May import: `featcache.heads`, `featcache.finetuning`, `featcache.extraction` and below.
"""
