"""Environment variables of mmphi with their descriptions; ``docs/reference/environment.md`` lists the same."""

from __future__ import annotations

from collections.abc import Mapping

VARIABLES: Mapping[str, str] = {
    # Data and models of the presets.
    "MMPHI_PHOTOS": "a folder with images/ and captions.csv, which begins with the line image,caption",
    "MMPHI_MODELS": "a folder of pretrained models: `mmphi fetch models FOLDER` fetches them",
    "MMPHI_LLAVA": "a folder with llava_instruct_150k.json: `mmphi fetch llava FOLDER` fetches it and its images",
    "MMPHI_TEXT": "a text file, or a folder of texts",
    "MMPHI_COCO": "a folder with train2017/ of COCO: `mmphi fetch llava FOLDER` fetches the images that are named",
    "MMPHI_SPOKEN": "a CSV of recordings (audio, transcript): `mmphi tts` makes one",
    # Stores and machines.
    "MMPHI_UI": "address of MLflow's pages in links; http://127.0.0.1:5000 by default",
    "MMPHI_OPTUNA": "URL of Optuna's storage of studies; a database beside MLflow's by default",
    "MMPHI_HOST": "name of this machine in runs and leases; its host name by default",
    "MMPHI_LEASE_S": "seconds without a heartbeat after which a run counts as dead; 90 by default",
    "MMPHI_BUSY_S": "seconds to wait for a locked SQLite database; 60 by default",
    # Behaviour of a process.
    "MMPHI_BESIDE": "0 builds one stage after the other, and not two independent ones at the same time",
    "MMPHI_KEEP_MEMORY": "0 gives freed memory back to the system at once",
    "MMPHI_API_KEY": "key that `mmphi serve` and `mmphi demo` ask for",
}
