//! The tree: every form of a reference, what a file says about itself, and what is not there.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::io::Errno;
use tempfile::TempDir;

use crate::support::artifact::Published;
use crate::support::model::{SampleModel, assert_same_files};
use crate::support::mount::Mount;
use crate::support::proxy::Proxy;
use crate::support::registry::Registry;
use crate::support::{PATIENCE, eventually, scratch, within};

/// A registry behind a counting proxy, with `org/m` by the tags `v1` and `latest`, and a mount.
struct Site {
    _registry: Registry,
    proxy: Proxy,
    mount: Mount,
    model: SampleModel,
    published: Published,
    _cache: TempDir,
}

fn site(seed: u64) -> Site {
    let registry = Registry::open();
    let model = SampleModel::new(seed);
    let published = model.docker_v02().publish(&registry, "org/m:v1");
    model.docker_v02().publish(&registry, "org/m:latest");
    let proxy = Proxy::start(registry.address());
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
    Site {
        _registry: registry,
        proxy,
        mount,
        model,
        published,
        _cache: cache,
    }
}

impl Site {
    fn host(&self) -> String {
        self.proxy.host()
    }

    /// The host as a name without a colon.
    fn plain_host(&self) -> String {
        format!("{}_", self.host().replace(':', "_"))
    }

    fn hex(&self) -> &str {
        &self.published.digest["sha256:".len()..]
    }
}

#[track_caller]
fn assert_errno<T: std::fmt::Debug>(result: io::Result<T>, wanted: Errno, what: &str) {
    match result {
        Ok(value) => panic!("{what}: {value:?}, should be {wanted}"),
        Err(error) => assert_eq!(
            error.raw_os_error(),
            Some(wanted.raw_os_error()),
            "{what}: {error}"
        ),
    }
}

#[test]
fn every_form_of_a_reference_shows_the_model() {
    let site = site(1);
    let (host, digest, hex) = (site.host(), &site.published.digest, site.hex());
    let forms = [
        format!("{host}/org/m:v1"),
        format!("{host}/org/m:latest"),
        format!("{host}/org/m@{digest}"),
        format!("{host}/org/m/@v1"),
        format!("{host}/org/m/@latest"),
        format!("{host}/org/m/@sha256-{hex}"),
        format!("{}/org/m:v1", site.plain_host()),
        format!("{}/org/m/@v1", site.plain_host()),
        format!("{}/org/m/@sha256-{hex}", site.plain_host()),
    ];
    for form in &forms {
        assert_same_files(&site.mount.files(form), site.model.files());
    }
    // By its tag the version is seen as well as by its digest.
    assert_eq!(
        site.mount.xattr(&forms[0], "user.oci.digest").as_deref(),
        Some(digest.as_str())
    );
}

#[test]
fn an_untagged_repository_shows_latest_once_a_file_of_it_was_asked_for() {
    let site = site(2);
    let repository = format!("{}/org/m", site.host());
    let wanted = &site.model.files()["config.json"];
    assert_eq!(
        &site.mount.read(&format!("{repository}/config.json")),
        wanted
    );
    let names = site.mount.list(&repository);
    for name in site.model.files().keys().filter(|name| !name.contains('/')) {
        assert!(names.contains(name), "{name} is not among {names:?}");
    }
    assert_eq!(
        site.mount.read(&format!("{repository}/onnx/config.json")),
        site.model.files()["onnx/config.json"]
    );
    assert_errno(
        site.mount.try_read(&format!("{repository}/absent.json")),
        Errno::NOENT,
        "a file that is not there",
    );
}

#[test]
fn aliases_without_a_colon_are_links_to_the_reference() {
    let site = site(3);
    let repository = format!("{}/org/m", site.host());
    let target = |name: &str| {
        let path = site.mount.path(&format!("{repository}/{name}"));
        within(PATIENCE, name, move || fs::read_link(path)).unwrap()
    };
    assert_eq!(target("@v1"), Path::new("../m:v1"));
    assert_eq!(
        target(&format!("@sha256-{}", site.hex())),
        Path::new(&format!("../m@{}", site.published.digest))
    );
}

#[test]
fn short_names_are_links_to_docker_hub() {
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--offline"]);
    for (name, target) in [
        ("somebody", "docker.io/somebody"),
        ("gpt2:v1", "docker.io/library/gpt2:v1"),
    ] {
        let path = mount.path(name);
        assert_eq!(
            within(PATIENCE, name, move || fs::read_link(path)).unwrap(),
            Path::new(target)
        );
    }
}

#[test]
fn hosts_and_namespaces_are_directories_without_network() {
    let site = site(4);
    let host = site.host();
    for below in [
        host.clone(),
        format!("{host}/org"),
        format!("{host}/any/depth/of/names"),
    ] {
        assert!(site.mount.stat(&below).is_dir(), "{below}");
    }
    assert_eq!(site.mount.list(&host), Vec::<String>::new());
    site.proxy.settle();
    assert!(
        site.proxy.records().is_empty(),
        "{:?}",
        site.proxy.records()
    );

    // What was asked for by name is listed from then on.
    assert!(site.mount.stat(&format!("{host}/org/m:v1")).is_dir());
    assert!(site.mount.list(&host).contains(&"org".to_owned()));
    assert!(
        site.mount
            .list(&format!("{host}/org"))
            .contains(&"m:v1".to_owned())
    );
    assert!(site.mount.list("").contains(&host));
}

#[test]
fn a_repository_lists_its_tags_and_fetches_no_manifest_for_it() {
    let site = site(5);
    let repository = format!("{}/org/m", site.host());
    let names = site.mount.list(&repository);
    assert!(
        names.contains(&"@v1".to_owned()) && names.contains(&"@latest".to_owned()),
        "{names:?}"
    );
    site.proxy.settle();
    let manifests = site
        .proxy
        .records()
        .into_iter()
        .filter(|r| r.method == "GET" && r.path.contains("/manifests/"));
    assert_eq!(manifests.count(), 0);
}

#[test]
fn a_name_that_cannot_be_a_reference_is_absent_without_asking_anybody() {
    let site = site(6);
    let host = site.host();
    let long = "x".repeat(200);
    let names = [
        "Upper.Case..host".to_owned(),
        "-leading.dash".to_owned(),
        ".hidden".to_owned(),
        ".Trash-0".to_owned(),
        "autorun.inf:".to_owned(),
        format!("{host}/UPPER"),
        format!("{host}/org/UPPER:v1"),
        format!("{host}/org/m:"),
        format!("{host}/org/m:sp ace"),
        format!("{host}/org/m:{long}"),
        format!("{host}/org/m@"),
        format!("{host}/org/m@sha256:123"),
        format!("{host}/org/m@sha256:{}", "g".repeat(64)),
        format!("{host}/org/m@md5:{}", "0".repeat(32)),
        format!("{host}/org/-m:v1"),
        format!("{host}/org/m..x:v1"),
        format!("{host}/org/\u{fc}:v1"),
        format!("{host}/.git"),
        format!("{host}/org/.git"),
    ];
    for name in &names {
        assert_errno(site.mount.try_stat(name), Errno::NOENT, name);
    }
    site.proxy.settle();
    assert!(
        site.proxy.records().is_empty(),
        "{:?}",
        site.proxy.records()
    );
}

#[test]
fn what_the_registry_does_not_have_is_absent_and_remembered_so() {
    let site = site(7);
    let host = site.host();
    let names = [
        format!("{host}/org/m:absent"),
        format!("{host}/org/absent:v1"),
        format!("{host}/org/m@sha256:{}", "0".repeat(64)),
    ];
    for name in &names {
        for _ in 0..20 {
            assert_errno(site.mount.try_stat(name), Errno::NOENT, name);
        }
    }
    site.proxy.settle();
    // HEAD, perhaps GET, and a ping or so each: not one for each of the sixty lookups.
    assert!(
        site.proxy.records().len() <= 12,
        "{:?}",
        site.proxy.records()
    );
}

#[test]
fn the_manifest_and_config_lie_beside_the_files() {
    let site = site(8);
    let reference = format!("{}/org/m:v1", site.host());
    let names = site.mount.list(&format!("{reference}/.oci"));
    assert!(
        names.contains(&"manifest.json".to_owned()) && names.contains(&"config.json".to_owned()),
        "{names:?}"
    );
    assert_eq!(
        site.mount.read(&format!("{reference}/.oci/manifest.json")),
        site.published.manifest
    );
    let config = site.mount.read(&format!("{reference}/.oci/config.json"));
    let manifest: serde_json::Value = serde_json::from_slice(&site.published.manifest).unwrap();
    assert_eq!(
        manifest["config"]["digest"],
        crate::support::content::digest(&config)
    );
}

#[test]
fn attributes_tell_what_a_file_is_and_how_much_of_it_is_here() {
    let site = site(9);
    let reference = format!("{}/org/m:v1", site.host());
    let shard = format!("{reference}/model-00003-of-00003.safetensors");
    let bytes = &site.model.files()["model-00003-of-00003.safetensors"];
    let size = bytes.len() as u64;

    let before = site.mount.stat(&shard);
    assert_eq!(
        (before.size(), before.mode(), before.nlink()),
        (size, 0o100_444, 1)
    );
    // Nothing of it is local, and still no tool may take it for a hole.
    assert!(
        (1..=16).contains(&before.blocks()),
        "{} blocks",
        before.blocks()
    );
    assert_eq!(
        site.mount.xattr(&shard, "user.ocifs.cached").as_deref(),
        Some("0")
    );
    assert_eq!(
        site.mount.xattr(&shard, "user.ocifs.verified").as_deref(),
        Some("false")
    );
    assert_eq!(
        site.mount.xattr(&shard, "user.oci.digest"),
        Some(crate::support::content::digest(bytes))
    );
    let media_type = site.mount.xattr(&shard, "user.oci.mediatype");
    assert_eq!(
        media_type.as_deref(),
        Some("application/vnd.docker.ai.safetensors")
    );
    assert_eq!(site.mount.xattr(&shard, "user.no.such.attribute"), None);

    assert!(site.mount.read(&shard) == *bytes);
    eventually(PATIENCE, "the file is verified", || {
        (site.mount.xattr(&shard, "user.ocifs.verified").as_deref() == Some("true")).then_some(())
    });
    assert_eq!(
        site.mount.xattr(&shard, "user.ocifs.cached"),
        Some(size.to_string())
    );
    // The kernel may keep attributes for a second or so.
    eventually(PATIENCE, "stat shows the blocks", || {
        (site.mount.stat(&shard).blocks() * 512 >= size).then_some(())
    });

    let folder = site.mount.stat(&format!("{reference}/onnx"));
    assert_eq!(folder.mode(), 0o040_555);
    // 2025-10-05T12:34:56Z, as the artifact's config says.
    assert_eq!(
        site.mount.stat(&format!("{reference}/config.json")).mtime(),
        1_759_667_696
    );
}

#[test]
fn node_numbers_are_the_same_after_a_remount() {
    let registry = Registry::open();
    let model = SampleModel::new(10);
    let reference = model.docker_v02().publish(&registry, "org/m:v1").reference;
    let cache = scratch("cache");
    let numbers = || {
        let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
        let number = |name: &str| mount.stat(&format!("{reference}/{name}")).ino();
        let numbers: Vec<u64> = model.files().keys().map(|name| number(name)).collect();
        mount.unmount();
        numbers
    };
    let (first, second) = (numbers(), numbers());
    assert_eq!(first, second);
    let distinct: std::collections::BTreeSet<_> = first.iter().collect();
    assert_eq!(distinct.len(), first.len());
}

type Attempt = Box<dyn FnOnce() -> io::Result<()> + Send>;

#[test]
fn every_attempt_to_change_something_is_refused_as_on_a_read_only_file_system() {
    let site = site(11);
    let reference = format!("{}/org/m:v1", site.host());
    let file = site.mount.path(&format!("{reference}/config.json"));
    let folder = site.mount.path(&reference);
    assert!(site.mount.stat(&reference).is_dir());
    let cases: Vec<(&str, Attempt)> = vec![
        ("open for writing", {
            let f = file.clone();
            Box::new(move || File::options().write(true).open(f).map(drop))
        }),
        ("append", {
            let f = file.clone();
            Box::new(move || File::options().append(true).open(f).map(drop))
        }),
        ("create", {
            let f = folder.join("new");
            Box::new(move || File::create(f).map(drop))
        }),
        ("mkdir", {
            let f = folder.join("new");
            Box::new(move || fs::create_dir(f))
        }),
        ("mkdir at the root", {
            let f = site.mount.path("New Folder");
            Box::new(move || fs::create_dir(f))
        }),
        ("unlink", {
            let f = file.clone();
            Box::new(move || fs::remove_file(f))
        }),
        ("rmdir", {
            let f = folder.join("onnx");
            Box::new(move || fs::remove_dir(f))
        }),
        ("rename", {
            let (f, g) = (file.clone(), folder.join("new"));
            Box::new(move || fs::rename(f, g))
        }),
        ("link", {
            let (f, g) = (file.clone(), folder.join("new"));
            Box::new(move || fs::hard_link(f, g))
        }),
        ("symlink", {
            let f = folder.join("new");
            Box::new(move || std::os::unix::fs::symlink("x", f))
        }),
        ("chmod", {
            let f = file.clone();
            Box::new(move || {
                fs::set_permissions(f, std::os::unix::fs::PermissionsExt::from_mode(0o600))
            })
        }),
        ("chown", {
            let f = file.clone();
            Box::new(move || std::os::unix::fs::chown(f, Some(1), Some(1)))
        }),
        ("truncate", {
            let f = file.clone();
            Box::new(move || {
                Ok(rustix::fs::open(
                    f,
                    rustix::fs::OFlags::WRONLY | rustix::fs::OFlags::TRUNC,
                    0.into(),
                )
                .map(drop)?)
            })
        }),
        ("setxattr", {
            let f = file.clone();
            Box::new(move || {
                Ok(rustix::fs::setxattr(
                    f,
                    "user.x",
                    b"1",
                    rustix::fs::XattrFlags::empty(),
                )?)
            })
        }),
        ("removexattr", {
            let f = file.clone();
            Box::new(move || Ok(rustix::fs::removexattr(f, "user.oci.digest")?))
        }),
    ];
    for (what, attempt) in cases {
        assert_errno(within(PATIENCE, what, attempt), Errno::ROFS, what);
    }
    assert_same_files(&site.mount.files(&reference), site.model.files());
}

#[test]
fn reads_behind_the_end_and_of_the_wrong_kind_are_what_posix_says() {
    let site = site(12);
    let reference = format!("{}/org/m:v1", site.host());
    let file = format!("{reference}/config.json");
    let size = site.model.files()["config.json"].len() as u64;
    assert_eq!(site.mount.try_read_at(&file, size, 0).unwrap(), b"");
    let behind = site.mount.try_read_at(&file, size + 10, 1).unwrap_err();
    assert_eq!(behind.kind(), io::ErrorKind::UnexpectedEof);
    assert_errno(
        site.mount.try_read(&reference),
        Errno::ISDIR,
        "read of a directory",
    );
    assert_errno(
        site.mount.try_list(&file),
        Errno::NOTDIR,
        "listing of a file",
    );
    assert_errno(
        site.mount.try_stat(&format!("{file}/x")),
        Errno::NOTDIR,
        "a name below a file",
    );
    assert_errno(
        site.mount.try_stat(&format!("{reference}/absent")),
        Errno::NOENT,
        "an absent file",
    );
    assert_errno(
        site.mount
            .try_stat(&format!("{reference}/{}", "n".repeat(256))),
        Errno::NAMETOOLONG,
        "a long name",
    );
}
