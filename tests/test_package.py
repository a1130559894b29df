"""The .deb, packed from the release binary that is there: what is in it, what it asks for, and that its scripts are sound. Its
life on a booted Debian is tests/packages/run."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from certificates import Authority
from support import BINARY, REPOSITORY

TOOL = REPOSITORY / "target/tools/bin/cargo-deb"
SCRIPTS = REPOSITORY / "packaging/debian"


def out_of(*command, **options):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **options)
    assert done.returncode == 0, f"{command}: {done.stderr}{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def deb(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deb")
    out_of(REPOSITORY / "packaging/build", "--no-build", "--fast", "--arch", "amd64", "--out", folder)
    (made,) = folder.glob("pool/*.deb")
    return made


def fields(deb):
    out = {}
    for line in out_of("dpkg-deb", "-f", deb).splitlines():
        if not line.startswith(" "):
            name, _, value = line.partition(": ")
            out[name] = value
    return out


def test_it_holds_what_a_box_needs(deb):
    listed = {}
    for line in out_of("dpkg-deb", "-c", deb).splitlines():
        mode, owner, _size, _day, _time, path = line.split(maxsplit=5)
        listed[path.removeprefix(".")] = (mode, owner)
    for path, mode in {
        "/usr/bin/tidegate": "-rwxr-xr-x",
        "/etc/tidegate/gateway.toml": "-rw-r--r--",
        "/usr/lib/systemd/system/tidegate.service": "-rw-r--r--",
        "/usr/lib/systemd/system/tidegate.socket": "-rw-r--r--",
        "/usr/lib/sysusers.d/tidegate.conf": "-rw-r--r--",
        "/usr/lib/tmpfiles.d/tidegate.conf": "-rw-r--r--",
        "/usr/share/tidegate/modules/average.wasm": "-rw-r--r--",
        "/usr/share/man/man1/tidegate.1.gz": "-rw-r--r--",
        "/usr/share/man/man5/gateway.toml.5.gz": "-rw-r--r--",
        "/usr/share/bash-completion/completions/tidegate": "-rw-r--r--",
        "/usr/share/doc/tidegate/copyright": "-rw-r--r--",
    }.items():
        assert listed.get(path) == (mode, "0/0"), f"{path}: {listed.get(path)}"
    # Nothing else goes where the administrator's files are, and no data.
    assert [p for p in listed if p.startswith("/etc/") and not p.endswith("/")] == ["/etc/tidegate/gateway.toml"]
    assert not [p for p in listed if p.startswith("/var")]


def test_the_configuration_is_a_conffile_and_valid(deb, tmp_path):
    out_of("dpkg-deb", "-e", deb, tmp_path / "control")
    assert (tmp_path / "control/conffiles").read_text() == "/etc/tidegate/gateway.toml\n"
    out_of("dpkg-deb", "-x", deb, tmp_path / "files")
    said = out_of(BINARY, "check", "--config", tmp_path / "files/etc/tidegate/gateway.toml")
    assert "is valid" in said
    text = (tmp_path / "files/etc/tidegate/gateway.toml").read_text()
    assert 'data_dir = "/var/lib/tidegate"' in text and 'dir = "/var/lib/tidegate/modules.d"' in text
    # What stands behind a # is valid, too.
    examples = re.sub(r"^# (?=\[|[a-z_]+ = )", "", text, flags=re.M).replace('password = { credential = "cloud.password" }', 'password = "x"')
    examples = examples.replace("$argon2id$…", out_of(BINARY, "passwd", input="secret\n").strip().split('"')[-1])
    cert, key = Authority(tmp_path / "pki").server("mqtt")
    assert '"/etc/tidegate/server.pem"' in examples
    examples = examples.replace("/etc/tidegate/server.pem", str(cert))
    (tmp_path / "examples.toml").write_text(examples)
    # As systemd's LoadCredential gives it.
    (tmp_path / "credentials").mkdir()
    key.rename(tmp_path / "credentials/mqtt.key")
    environment = {**os.environ, "CREDENTIALS_DIRECTORY": str(tmp_path / "credentials")}
    out_of(BINARY, "check", "--config", tmp_path / "examples.toml", env=environment)
    # The socket that systemd opens is the listener's.
    bind = re.search(r'^bind = "(.+?)"', text, re.M).group(1)
    assert f"ListenStream={bind}\n" in (tmp_path / "files/usr/lib/systemd/system/tidegate.socket").read_text()


def needs(binary):
    """(the libraries that it names, the highest version of glibc among its symbols)"""
    libraries = set(re.findall(r"\(NEEDED\).*\[(.+?)\]", out_of("readelf", "-d", binary)))
    named = out_of("readelf", "-V", binary)
    versions = {tuple(map(int, v.split("."))) for v in re.findall(r"GLIBC_(\d[\d.]*)", named)}
    # Packed relative relocations; glibc 2.36 was the first to know them.
    if "GLIBC_ABI_DT_RELR" in named:
        versions.add((2, 36))
    return libraries, ".".join(map(str, max(versions)))


def test_depends_says_what_the_binary_needs(deb, tmp_path):
    check_depends(deb, tmp_path)


def check_depends(deb, folder):
    out_of("dpkg-deb", "-x", deb, folder)
    libraries, glibc = needs(folder / "usr/bin/tidegate")
    depends = [d.strip() for d in fields(deb)["Depends"].split(",")]
    assert f"libc6 (>= {glibc})" in depends, f"it needs glibc {glibc}: {depends}"
    assert ("libgcc_s.so.1" in libraries) == ("libgcc-s1" in depends), f"{libraries} and {depends}"
    ours = {"libgcc_s.so.1", "libc.so.6", "libm.so.6", "libpthread.so.0", "libdl.so.2"}
    unknown = {library for library in libraries if library not in ours and not library.startswith("ld-linux")}
    assert unknown == set(), "which package has it?"


def test_the_changelog_is_of_this_version(deb):
    first = (SCRIPTS / "changelog").read_text().splitlines()[0]
    version = fields(deb)["Version"]
    assert first.startswith(f"tidegate ({version}) "), f"{first!r} and version {version}"
    assert out_of(BINARY, "--version").split()[1] == version.rpartition("-")[0]


def test_lintian_finds_nothing(deb):
    out_of("lintian", "--allow-root", "--fail-on", "error,warning", deb)


def test_the_scripts_are_sound():
    debian = [SCRIPTS / name for name in ("config", "postinst", "prerm", "postrm")]
    others = [REPOSITORY / name for name in ("packaging/build", "packaging/repository", "tests/packages/run")]
    out_of("shellcheck", "--external-sources", *debian, *others)
    for script in [*debian, *others]:
        assert os.access(script, os.X_OK), f"{script} is not executable"


def test_a_repository_is_signed_by_the_key_that_was_given(deb, tmp_path):
    home = tmp_path / "gnupg"
    home.mkdir(mode=0o700)
    env = {**os.environ, "GNUPGHOME": str(home)}
    out_of("gpg", "--batch", "--passphrase", "", "--quick-generate-key", "somebody", "ed25519", "sign", "never", env=env)
    try:
        (tmp_path / "repo/pool").mkdir(parents=True)
        (tmp_path / "repo/pool" / deb.name).symlink_to(deb)
        out_of(REPOSITORY / "packaging/repository", tmp_path / "repo", "somebody", env=env)
        dists = tmp_path / "repo/dists/stable"
        keyring = tmp_path / "repo/tidegate-archive-keyring.gpg"
        verified = subprocess.run(["gpgv", "--keyring", keyring, dists / "InRelease"], capture_output=True, text=True)
        assert verified.returncode == 0 and '"somebody"' in verified.stderr, verified.stderr
        assert "Package: tidegate" in (dists / "main/binary-amd64/Packages").read_text()
        # The files that the index names are those that are there.
        for name in ["main/binary-amd64/Packages", "main/binary-armhf/Packages.gz"]:
            sum_ = out_of("sha256sum", dists / name).split()[0]
            assert f"{sum_} " in (dists / "InRelease").read_text(), name
    finally:
        subprocess.run(["gpgconf", "--kill", "all"], env=env, check=False)
