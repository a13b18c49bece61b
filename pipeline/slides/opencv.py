"""OpenCV, imported in one place: it is needed for slides only."""

from pipeline.config import ConfigError

try:
    import cv2
except ImportError as error:
    raise ConfigError("slides need another package: pip install 'tessera[slides]'") from error

__all__ = ["cv2"]
