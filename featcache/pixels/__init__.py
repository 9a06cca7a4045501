"""From the bytes of one image to the array that a network expects.

In: bytes, arrays or PIL images. Out: uint8 pixels, resized and cropped; their normalisation.
Here: decoding, preprocessing, augmented views, canary images.
May import: `featcache.errors`, `featcache.system`.
"""
