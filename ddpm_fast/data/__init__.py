"""Training images: folders, archives, arrays and drawn avatars, as uint8 in memory."""

from .dataset import IMAGE_KEYS, ImageData, load_data
from .image_files import DataError

__all__ = ["IMAGE_KEYS", "DataError", "ImageData", "load_data"]
