"""``mmphi fetch``: download the data and models that presets name into a folder; interrupted downloads resume."""

from __future__ import annotations

import hashlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mmphi.config.arguments import CommandParser
from mmphi.data.images import open_image
from mmphi.data.json_rows import load_json
from mmphi.errors import DataError, ImageError, ModelError

HUB = "https://huggingface.co/datasets/liuhaotian/LLaVA-Instruct-150K/resolve/main"
COCO = "http://images.cocodataset.org/train2017"
INSTRUCT = "llava_instruct_150k.json"
CHUNK, TRIES, PAUSE_S, TIMEOUT_S = 1 << 20, 4, 1.0, 30.0
# Models in experiments/photos.yaml, with their hub repositories.
MODELS = {
    "smollm2-135m-instruct": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "all-minilm-l6-v2": "sentence-transformers/all-MiniLM-L6-v2",
}
TOWER, TOWER_REPOSITORY = "efficientnet-lite0.safetensors", "timm/tf_efficientnet_lite0.in1k"
PATTERNS = ["*.json", "*.safetensors", "*.txt", "*.model"]


def download(url: str, path: Path) -> None:
    """Download a file, or resume a partial download of an earlier call.

    The size and SHA-256 of the file are verified if the server sends them.

    Raises:
        DataError: If the file cannot be downloaded or written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    for attempt in range(TRIES):
        try:
            _go_on(url, part)
            part.rename(path)
            return
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code != 416:
                raise DataError(f"{url} cannot be fetched: {error.code} {error.reason}", "check the address") from error
            reason: Exception = error
            if error.code == 416:
                part.unlink(missing_ok=True)  # The server has no bytes after the partial download: start over.
        except (urllib.error.URLError, TimeoutError, ConnectionError, ValueError) as error:
            reason = error
        except OSError as error:
            raise DataError(
                f"{part} cannot be written: {error.strerror}", "make room; the same call resumes"
            ) from error
        time.sleep(PAUSE_S * attempt)
    raise DataError(f"{url} cannot be fetched: {reason}", "check the network; the same command resumes from there")


def _go_on(url: str, part: Path) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
        going_on = response.status == 206
        length = response.headers.get("Content-Length")
        digest = str(response.headers.get("X-Linked-Etag") or "").strip('"')
        with part.open("ab" if going_on else "wb") as file:
            while block := response.read(CHUNK):
                file.write(block)
    if length is not None and part.stat().st_size != int(length) + (have if going_on else 0):
        raise ValueError(f"the download ended after {part.stat().st_size} bytes")
    if len(digest) == 64 and _sha256(part) != digest:
        part.unlink()
        raise ValueError("the checksum differs from the one that the server sent")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_llava(folder: Path, instruct: str = HUB, images: str = COCO, workers: int = 16, most: int = 0) -> int:
    """Download LLaVA-Instruct-150k and its COCO images: ``llava_instruct_150k.json`` and ``train2017/``.

    Args:
        folder: Destination folder.
        instruct: URL of the folder of the JSON file.
        images: URL of the folder of the images.
        workers: Number of concurrent downloads of images.
        most: Maximum number of images; 0 fetches all.

    Returns:
        Number of images, including those of earlier calls.

    Raises:
        DataError: If the file or some of the images cannot be downloaded; completed files are kept.
    """
    path = folder / INSTRUCT
    if not path.exists():
        print(f"{INSTRUCT}: 229 MB from {instruct}", flush=True)
        download(f"{instruct}/{INSTRUCT}", path)
    rows = load_json(path)
    names = dict.fromkeys(Path(str(row["image"])).name for row in rows if isinstance(row, dict) and row.get("image"))
    wanted = list(names)[: most or None]
    target = folder / "train2017"
    missing = [name for name in wanted if not (target / name).exists()]
    print(f"images: {len(wanted) - len(missing)} of {len(wanted)} exist already", flush=True)
    failed = _all(missing, lambda name: _image(f"{images}/{name}", target / name), workers)
    if failed:
        listed = ", ".join(f"{name} ({why})" for name, why in failed[:3])
        raise DataError(
            f"{len(failed)} of {len(wanted)} images could not be fetched: {listed}", "run the same command again"
        )
    return len(wanted)


def _image(url: str, path: Path) -> None:
    download(url, path)
    try:
        open_image(path)
    except ImageError:
        path.unlink()
        raise


def _all(names: Iterable[str], fetch: Callable[[str], None], workers: int) -> list[tuple[str, str]]:
    """Fetch many files concurrently, with a progress bar; returns the failed ones with the reasons."""
    from tqdm.auto import tqdm

    def one(name: str) -> tuple[str, str] | None:
        try:
            fetch(name)
        except DataError as error:
            return name, error.what
        return None

    names = list(names)
    with ThreadPoolExecutor(workers) as pool:
        outcomes = tqdm(pool.map(one, names), total=len(names), desc="images", unit="image", disable=not names)
        return [outcome for outcome in outcomes if outcome is not None]


def fetch_models(folder: Path) -> None:
    """Download the three models of the preset ``photos``, under the names that it uses.

    Raises:
        ModelError: If the hub is unreachable; the message lists the required files.
    """
    from mmphi.data.hf_connectivity import hub_is_reachable

    missing = [name for name in (*MODELS, TOWER) if not (folder / name).exists()]
    if missing and not hub_is_reachable():
        raise ModelError(
            f"the hub is unreachable, and {folder} lacks {', '.join(missing)}",
            f"put there: {wanted_models()}",
        )
    from huggingface_hub import hf_hub_download, snapshot_download

    for name, repository in MODELS.items():
        if name in missing:
            print(f"{name}: from {repository}", flush=True)
            snapshot_download(repository, local_dir=folder / name, allow_patterns=PATTERNS)
    if TOWER in missing:
        print(f"{TOWER}: from {TOWER_REPOSITORY}", flush=True)
        fetched = hf_hub_download(TOWER_REPOSITORY, "model.safetensors", local_dir=folder / ".fetched")
        Path(fetched).rename(folder / TOWER)


def wanted_models() -> str:
    """Returns a description of the files of the models in ``photos``."""
    folders = [f"{name}/ ({repository}: configuration, tokenizer, safetensors)" for name, repository in MODELS.items()]
    return ", ".join([*folders, f"{TOWER} ({TOWER_REPOSITORY}: model.safetensors)"])


def main(arguments: list[str]) -> int:
    """``mmphi fetch``."""
    parser = CommandParser(prog="mmphi fetch", description=__doc__.partition("; ")[0])
    parser.add_argument(
        "what", choices=["llava", "models"], help="LLaVA-Instruct-150k with its images, or the preset photos' models"
    )
    parser.add_argument(
        "folder", type=Path, help="destination folder; the same command resumes an interrupted download"
    )
    parser.add_argument("--max-images", type=int, default=0, help="fetch at most this many images [all]")
    parser.add_argument("--workers", type=int, default=16, help="images fetched at once [16]")
    parser.add_argument("--instruct-url", default=HUB, help="address of the folder of the JSON file")
    parser.add_argument("--images-url", default=COCO, help="address of the folder of the images")
    options = parser.parse_args(arguments)
    if options.what == "models":
        fetch_models(options.folder)
        print(f"export MMPHI_MODELS={options.folder.absolute()}")
        return 0
    count = fetch_llava(options.folder, options.instruct_url, options.images_url, options.workers, options.max_images)
    print(json.dumps({"images": count}))
    print(f"export MMPHI_LLAVA={options.folder.absolute()} MMPHI_COCO={options.folder.absolute()}")
    return 0
