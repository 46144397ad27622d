"""Images from folders and archives, decoded as they are needed.

>>> batches = open_batches("imagenet/val", preprocessing="imagenet", images=250)
>>> for images, labels in batches: ...        # f32[N,3,224,224], int64[N]; as often as you like
"""

from fxquant.data.batches import ImageBatches, open_batches
from fxquant.data.images import ImageSet, open_images
from fxquant.data.preprocessing import PREPROCESSINGS, Preprocessing
from fxquant.data.root import data_root

__all__ = [
    "PREPROCESSINGS",
    "ImageBatches",
    "ImageSet",
    "Preprocessing",
    "data_root",
    "open_batches",
    "open_images",
]
