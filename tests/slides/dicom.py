"""A small DICOM whole slide: one file a level, JPEG tiles in row-major order (TILED_FULL), as scanners write it. Needs pydicom."""

from pathlib import Path

import cv2
import numpy as np
import simplejpeg

WSM = "1.2.840.10008.5.1.4.1.1.77.1.6"
"""VL Whole Slide Microscopy Image Storage."""
JPEG_BASELINE = "1.2.840.10008.1.2.4.50"


def write_dicom(folder: Path, image: np.ndarray, *, mpp: float = 0.5, downsamples: tuple[int, ...] = (4,), tile_px: int = 256) -> Path:
    """The series in `folder`; returns the folder."""
    from pydicom.uid import generate_uid

    folder.mkdir(parents=True, exist_ok=True)
    series, frame = generate_uid(entropy_srcs=[str(folder), "series"]), generate_uid(entropy_srcs=[str(folder), "frame"])
    for number, downsample in enumerate((1, *downsamples)):
        size = (image.shape[1] // downsample, image.shape[0] // downsample)
        level = image if downsample == 1 else cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        data = _dataset(level, mpp=mpp * downsample, tile_px=tile_px, number=number)
        data.SeriesInstanceUID, data.StudyInstanceUID, data.FrameOfReferenceUID = series, series, frame
        data.save_as(folder / f"level-{number}.dcm", enforce_file_format=True)
    return folder


def _dataset(level: np.ndarray, *, mpp: float, tile_px: int, number: int):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.encaps import encapsulate
    from pydicom.uid import generate_uid

    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = JPEG_BASELINE
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = WSM
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    data.Modality, data.Manufacturer = "SM", "Tessera tests"
    data.ImageType = ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"] if number == 0 else ["DERIVED", "PRIMARY", "VOLUME", "RESAMPLED"]
    data.SamplesPerPixel, data.PhotometricInterpretation, data.PlanarConfiguration = 3, "YBR_FULL_422", 0
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 8, 8, 7, 0
    data.Rows = data.Columns = tile_px
    data.TotalPixelMatrixRows, data.TotalPixelMatrixColumns = level.shape[:2]
    data.TotalPixelMatrixFocalPlanes, data.NumberOfOpticalPaths = 1, 1
    data.DimensionOrganizationType = "TILED_FULL"
    data.LossyImageCompression, data.LossyImageCompressionMethod = "01", "ISO_10918_1"
    measures, shared, path = Dataset(), Dataset(), Dataset()
    measures.PixelSpacing, measures.SliceThickness = [mpp / 1000, mpp / 1000], 0.005
    shared.PixelMeasuresSequence = [measures]
    data.SharedFunctionalGroupsSequence = [shared]
    path.OpticalPathIdentifier, path.ObjectiveLensPower = "0", 20
    data.OpticalPathSequence = [path]
    frames = list(_tiles(level, tile_px))
    data.NumberOfFrames = len(frames)
    data.PixelData = encapsulate(frames)
    data["PixelData"].is_undefined_length = True
    return data


def _tiles(level: np.ndarray, tile_px: int):
    for y in range(0, level.shape[0], tile_px):
        for x in range(0, level.shape[1], tile_px):
            tile = np.full((tile_px, tile_px, 3), 255, np.uint8)
            part = level[y : y + tile_px, x : x + tile_px]
            tile[: part.shape[0], : part.shape[1]] = part
            yield simplejpeg.encode_jpeg(tile, quality=90, colorsubsampling="422")
