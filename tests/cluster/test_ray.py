"""A Ray cluster of two machines on this one, one of which is lost in the middle."""

from __future__ import annotations

import time

import pytest
import torch
from builders import byte_tokenizer, tiny_language
from PIL import Image

from mmphi.cluster.connect import Machines, join_cluster
from mmphi.cluster.embedding import embed_on_cluster
from mmphi.config import VisionSettings
from mmphi.config.textgen import TextgenSettings
from mmphi.errors import SettingsError
from mmphi.models.vision.vision_encoder import load_vision_encoder
from mmphi.textgen.generator_pool import GeneratorPool
from mmphi.textgen.shard_queue import ShardQueue
from mmphi.textgen.shard_reader import ShardReader

pytestmark = pytest.mark.cluster

ray = pytest.importorskip("ray")
LONG_S = 240


class Two:
    """Two machines: this one, and one that can be lost.

    Args:
        cores: Of each, as Ray is told.
    """

    def __init__(self, cores: int) -> None:
        from ray.cluster_utils import Cluster

        self.cores = cores
        self.cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": cores, "include_dashboard": False})
        self.other = self.cluster.add_node(num_cpus=cores)
        self.machines = join_cluster(self.cluster.address)

    def lose(self) -> None:
        self.cluster.remove_node(self.other, allow_graceful=False)

    def find_another(self) -> None:
        self.other = self.cluster.add_node(num_cpus=self.cores)


@pytest.fixture
def two(request):
    made = Two(request.param)
    yield made
    ray.shutdown()
    made.cluster.shutdown()


def until(happened):
    begun = time.monotonic()
    while not happened():
        assert time.monotonic() - begun < LONG_S, "it never happened"
        time.sleep(0.2)


@pytest.mark.parametrize("two", [1], indirect=True)  # Each core imports torch anew, which takes most of the time.
def test_features_by_two_machines_are_those_of_one_though_one_is_lost(two, tmp_path, own, weights):
    assert two.machines == Machines(2, 2 * two.cores, 0)
    assert two.machines.places() == 2 * two.cores
    encoder = load_vision_encoder(VisionSettings(model=own, pretrained=weights), torch.device("cpu"))
    images = []
    for i in range(120):
        torch.manual_seed(i)
        Image.fromarray(torch.randint(0, 255, (40, 40, 3), dtype=torch.uint8).numpy()).save(tmp_path / f"{i}.png")
        images.append((str(i), tmp_path / f"{i}.png"))
    (tmp_path / "7.png").write_bytes((tmp_path / "7.png").read_bytes()[:60])
    (tmp_path / "8.png").unlink()
    features, unread = {}, {}
    for number, (part, reasons) in enumerate(embed_on_cluster(images, encoder, 2, two.machines)):
        assert not part.keys() & features.keys()
        features |= part
        unread |= reasons
        if number == 5:
            two.lose()
    assert unread == {"7": "truncated or broken image", "8": "missing image"}
    assert features.keys() == {name for name, _ in images} - unread.keys()
    for name, path in images:
        if name not in unread:
            alone = encoder(encoder.preprocess(Image.open(path).convert("RGB"))[None])[0].half()
            torch.testing.assert_close(features[name], alone, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("two", [2], indirect=True)  # A generator takes two.
def test_generators_of_two_machines_fill_one_spool_though_one_is_lost(two, tmp_path):
    writer = tmp_path / "writer"
    tiny_language(initializer_range=0.05).model.save_pretrained(writer)
    byte_tokenizer().save_pretrained(writer)
    settings = TextgenSettings(
        model=str(writer), ray=two.cluster.address, batch=4, max_tokens=24, shard_documents=6, host="here"
    )
    told: list[str] = []
    spool = ShardQueue(str(tmp_path / "spool"), say=told.append)

    def written() -> set[str]:
        return {held.name.stream for held in spool.held()}

    with GeneratorPool(settings, str(tmp_path / "spool"), tmp_path / "fleet", say=told.append) as pool:
        assert len(pool.members) == 2
        until(lambda: written() >= {"here-0-1", "here-1-1"})
        two.lose()
        until(lambda: pool.watch() or sum(row["starts"] for row in pool.rows()) == 3)
        before = written()
        two.find_another()
        until(lambda: pool.watch() or written() - before)
        rows = pool.rows()
    assert sorted(row["starts"] for row in rows) == [1, 2]
    assert all(row["tokens"] and row["documents"] for row in rows)
    assert "2 machines, 4 cores, 0 GPUs: running 2 generators" in told[0]
    assert [line for line in told if "has died" in line]
    documents = [d for _, found in ShardReader(spool, say=told.append).everything() for d in found]
    assert len({document.id for document in documents}) == len(documents) >= 18
    assert all(document.logprob < 0 for document in documents)


def test_a_cluster_that_is_not_there_is_named():
    with pytest.raises(SettingsError, match=r"no Ray cluster at '127.0.0.1:1'"):
        join_cluster("127.0.0.1:1")
