"""From the bytes of one image to the array that a network expects.

In: bytes, arrays or PIL images. Out: uint8 pixels (c, h, w), resized and cropped; normalised.
Here: `decode`, `preprocessing`, augmented `views`, and the `canary` images.
May import: `featcache.fingerprint`, `featcache.system`, `featcache.errors`.
"""
