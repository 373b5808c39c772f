from __future__ import annotations

import io
import tarfile

import pytest
from tiny_corpus import librispeech_files, write_archive, write_tree

from pipeline.audio import AudioError, decode
from pipeline.sources import Source, SourceConfig, open_source
from shards.errors import UserError


def opened(path, **settings) -> Source:
    return open_source(SourceConfig(kind="librispeech", path=str(path), **settings))


@pytest.fixture
def tree(tmp_path):
    return write_tree(tmp_path / "LibriSpeech", librispeech_files())


@pytest.fixture
def archives(tmp_path):
    folder = tmp_path / "archives"
    folder.mkdir()
    files = librispeech_files()
    for split in ("dev-clean", "train-clean-100"):
        write_archive(folder / f"{split}.tar.gz", {n: d for n, d in files.items() if n.startswith((split, "README"))})
    return folder


def test_the_folders_yield_every_utterance_with_text_speaker_split_and_length(tree):
    made = list(opened(tree).utterances())
    assert len(made) == 24
    first = made[0]
    assert (first.key, first.audio) == ("1-100-0000", "dev-clean/1/100/1-100-0000.flac")
    assert (first.text, first.speaker, first.split, first.samples) == ("TEXT OF 1 100 0", "1", "dev-clean", 1601)


def test_parent_tree_and_split_folder_name_the_same_utterances(tree):
    whole = [u for u in opened(tree).utterances() if u.split == "dev-clean"]
    assert list(opened(tree.parent, splits=["dev-clean"]).utterances()) == whole
    assert list(opened(tree / "dev-clean").utterances()) == whole


def test_read_yields_bytes_in_the_requested_order_and_an_exception_for_a_missing_file(tree):
    source = opened(tree)
    uris = [u.audio for u in source.utterances()][::-1]
    (tree / uris[3]).unlink()
    answers = list(source.read(uris))
    assert [uri for uri, _ in answers] == uris
    assert isinstance(answers[3][1], AudioError)
    assert all(isinstance(data, Exception) for _, data in source.read(["a\0.flac", "x" * 300]))
    assert all(data == (tree / uri).read_bytes() for uri, data in answers if uri != uris[3])


@pytest.mark.parametrize("archived", [False, True])
def test_a_missing_split_is_an_error_that_lists_the_present_ones(tree, archives, archived):
    with pytest.raises(UserError, match=r"no split test-clean in .*which has dev-clean, train-clean-100"):
        opened(archives if archived else tree, splits=["dev-clean", "test-clean"])


@pytest.mark.parametrize("archived", [False, True])
def test_text_without_audio_and_audio_without_text_are_counted_and_listed(tmp_path, archived):
    files = librispeech_files(["dev-clean"])
    del files["dev-clean/1/100/1-100-0001.flac"]
    files["dev-clean/2/200/2-200.trans.txt"] = b"2-200-0001 ONLY ONE\n"
    path = write_archive(tmp_path / "dev-clean.tar.gz", files) if archived else write_tree(tmp_path, files)
    source = opened(path)
    assert len(list(source.utterances())) == 10
    problems = "\n".join(source.problems)
    assert "1 transcript lines without audio: 1-100-0001" in problems
    assert "1 recordings without a transcript: " in problems
    assert "2-200-0000.flac" in problems


@pytest.mark.parametrize("order", ["given", "reversed", "transcripts first", "transcripts last"])
def test_an_archive_yields_the_same_as_the_folders_wherever_the_transcripts_are(tmp_path, tree, order):
    files = {name: data for name, data in librispeech_files().items() if "train-clean-100" in name}
    names = list(files)
    if order == "reversed":
        names.reverse()
    elif order != "given":
        names.sort(key=lambda name: name.endswith(".trans.txt") is (order == "transcripts last"))
    archive = write_archive(tmp_path / "train-clean-100.tar.gz", {name: files[name] for name in names})
    source = opened(archive)
    assert source.sequential
    made = {u.id: u for u in source.utterances()}
    expected = {u.id: u for u in opened(tree, splits=["train-clean-100"]).utterances()}
    assert made.keys() == expected.keys()
    for identifier, utterance in made.items():
        other = expected[identifier]
        assert utterance.audio == f"train-clean-100.tar.gz#LibriSpeech/{other.audio}"
        assert (utterance.text, utterance.speaker, utterance.split) == (other.text, other.speaker, other.split)
        assert utterance.samples == other.samples
    positions = [names.index(u.audio.partition("#LibriSpeech/")[2]) for u in made.values()]
    assert positions == sorted(positions)
    assert source.problems == []


def test_archives_are_opened_once_when_read_in_order_over_several_calls(archives, monkeypatch):
    import gzip

    source = opened(archives)
    uris = [u.audio for u in source.utterances()]
    files = librispeech_files()
    passes = []
    real = gzip.open
    monkeypatch.setattr(gzip, "open", lambda *words, **more: passes.append(words[0]) or real(*words, **more))
    for start in range(0, 24, 5):
        for uri, data in source.read(uris[start : start + 5]):
            assert data == files[uri.partition("#LibriSpeech/")[2]]
    assert len(passes) == 2


def test_archives_are_read_in_any_order_and_missing_files_are_reported(archives):
    source = opened(archives)
    uris = [u.audio for u in source.utterances()]
    absent = "dev-clean.tar.gz#LibriSpeech/dev-clean/9/9/9-9-0000.flac"
    asked = [*uris[::-1], absent, uris[3], uris[3], uris[0]]
    files = librispeech_files()
    answers = list(source.read(asked))
    assert [uri for uri, _ in answers] == asked
    for uri, data in answers:
        if uri == absent:
            assert isinstance(data, AudioError)
        else:
            assert data == files[uri.partition("#LibriSpeech/")[2]]


def test_splits_select_inside_one_archive_and_a_missing_one_is_refused(tmp_path):
    archive = write_archive(tmp_path / "both.tar.gz", librispeech_files())
    assert {u.split for u in opened(archive, splits=["dev-clean"]).utterances()} == {"dev-clean"}
    with pytest.raises(UserError, match="no split test-other"):
        list(opened(archive, splits=["test-other"]).utterances())


def test_a_truncated_archive_is_refused_and_its_audio_is_an_exception(archives):
    source = opened(archives / "dev-clean.tar.gz")
    uris = [u.audio for u in source.utterances()]
    archive = archives / "dev-clean.tar.gz"
    whole = archive.read_bytes()
    for size in (0, 10, 3000, 8000, len(whole) - 9):
        archive.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"dev-clean\.tar\.gz' is truncated or corrupt"):
            list(opened(archive).utterances())
    archive.write_bytes(whole[:8000])
    answers = [data for _, data in source.read(uris)]
    assert isinstance(answers[-1], AudioError)
    assert len(decode(answers[0])) == 1601


@pytest.mark.parametrize("ending", [".tar", ".tar.bz2", ".tar.xz", ".tgz"])
def test_other_compressions_are_read_and_a_cut_anywhere_is_detected(archives, ending):
    import tarfile

    files = {name: data for name, data in librispeech_files(["dev-clean"]).items() if "/1/" in name}
    archive = archives / f"small{ending}"
    with tarfile.open(archive, f"w:{ending.rpartition('.')[2].replace('tgz', 'gz').replace('tar', '')}") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
            end = tar.offset
    assert len(list(opened(archive).utterances())) == 4
    whole = archive.read_bytes()
    cuts = [512, 700, end, end - 700] if ending == ".tar" else [len(whole) // 2, len(whole) - 20]
    for size in cuts:
        archive.write_bytes(whole[:size])
        with pytest.raises(UserError, match="truncated or corrupt"):
            list(opened(archive).utterances())


def test_an_id_in_two_splits_is_reported_with_both_locations(tree):
    write_tree(
        tree, {"test-x/1/100/" + n.rpartition("/")[2]: d for n, d in librispeech_files().items() if "/1/100/" in n}
    )
    with pytest.raises(UserError, match=r"duplicate key '1-100-0000'.*dev-clean/1.*test-x/1"):
        list(opened(tree).utterances())


def test_a_transcript_with_a_duplicate_utterance_is_reported_with_its_line(tree):
    (tree / "dev-clean/1/100/1-100.trans.txt").write_text("1-100-0000 A\n\n1-100-0000 B\n")
    with pytest.raises(UserError, match=r"duplicate key '1-100-0000' in line 3"):
        list(opened(tree).utterances())


def test_an_unreadable_recording_has_length_zero(tree):
    (tree / "dev-clean/1/100/1-100-0000.flac").write_bytes(b"")
    assert next(opened(tree).utterances()).samples == 0


def test_a_folder_without_speech_is_refused(tmp_path):
    with pytest.raises(UserError, match="no LibriSpeech splits"):
        opened(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="not a LibriSpeech archive"):
        opened(tmp_path / "notes.txt")


def test_files_of_a_mac_are_skipped_in_folders_and_archives(tmp_path):
    files = librispeech_files(["dev-clean"])
    mac = {
        f"{folder}/._{name}": b"\0\5\26\7\0\2\0\0Mac OS X"
        for folder, _, name in (n.rpartition("/") for n in files if "/" in n)
    }
    mac |= {f"__MACOSX/{name}": data for name, data in mac.items()}
    assert len(mac) == 2 * 18
    write_tree(tmp_path / "tree", files | mac)
    write_tree(tmp_path / "tree", {"._dev-clean": b"\0"})
    (tmp_path / "archives").mkdir()
    write_archive(tmp_path / "archives/dev-clean.tar.gz", dict(sorted((files | mac).items())))
    write_tree(tmp_path / "archives", {"._dev-clean.tar.gz": b"\0\5\26\7"})
    for path in (tmp_path / "tree", tmp_path / "archives"):
        source = opened(path)
        assert len(list(source.utterances())) == 12
        assert source.problems == []


def test_an_archive_with_a_false_number_in_its_headers_is_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        member = tarfile.TarInfo("LibriSpeech/dev-clean/1/2/1-2.trans.txt")
        member.pax_headers = {"GNU.sparse.map": "x,y", "GNU.sparse.size": "z"}
        tar.addfile(member)
    with pytest.raises(UserError, match=r"the archive .* is truncated or corrupt .*: download it again"):
        list(opened(path).utterances())


def test_a_transcript_with_a_character_that_labels_cannot_have_is_refused_with_its_line(tmp_path):
    tree = write_tree(tmp_path, librispeech_files(["dev-clean"]))
    (tree / "dev-clean/1/100/1-100.trans.txt").write_bytes(b"1-100-0000 A\n1-100-0001 B\0\n")
    with pytest.raises(UserError, match=r"the text in line 2 of .*1-100\.trans\.txt' has a NUL character"):
        list(opened(tree).utterances())
