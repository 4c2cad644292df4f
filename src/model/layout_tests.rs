//! Layouts of small manifests and listings, by hand and by chance.

use proptest::prelude::*;

use super::*;

const RAW: &str = "application/octet-stream";

fn file(layer: usize, name: &str) -> Step {
    Step {
        layer,
        role: Role::File(name.into()),
        clash: Clash::KeepFirst,
    }
}

fn tar(layer: usize, clash: Clash) -> Step {
    Step {
        layer,
        role: Role::tar(true, 0),
        clash,
    }
}

fn listing(paths: &[&str]) -> Result<Listing, TarError> {
    let member = |(n, path): (usize, &&str)| Member {
        path: (*path).into(),
        offset: 512 * n as u64,
        size: 1,
        item: Item::File,
        stamp: Stamp::default(),
    };
    Ok(Listing {
        form: Form::Plain,
        members: paths.iter().enumerate().map(member).collect(),
        notes: vec![],
        entries: 0,
    })
}

fn manifest(layers: usize) -> Manifest {
    Manifest::for_tests(&vec![(RAW, 10, &[][..]); layers])
}

fn source(layout: &Layout, path: &str) -> (usize, u64) {
    match layout.files[path].source {
        Source::Layer { layer, offset } => (layer, offset),
        _ => panic!(),
    }
}

#[test]
fn the_first_file_on_a_path_stays_and_the_second_is_not_lost() {
    let steps = [
        file(0, "a"),
        file(1, "a"),
        file(2, "a/b"),
        file(3, "d/e"),
        file(4, "d"),
        file(5, "../../f"),
        file(6, "/g"),
    ];
    let layout = lay_out(&manifest(7), &steps, &BTreeMap::new(), None);
    assert_eq!(layout.paths(), BTreeSet::from(["a", "d/e", "f"]));
    assert_eq!(source(&layout, "a"), (0, 0));
    assert_eq!(layout.hidden, BTreeSet::from([1, 2, 4, 6]));
    let notes = layout.notes.into_lines();
    for (note, part) in notes.iter().zip([
        "stays in its place",
        "`a` is a file",
        "directory of that name",
        "absolute",
    ]) {
        assert!(note.contains(part), "{note}");
    }
    assert_eq!(notes.len(), 4);
}

#[test]
fn the_same_blob_twice_on_one_path_is_no_clash() {
    let mut manifest = manifest(2);
    manifest.layers[1] = manifest.layers[0].clone();
    let layout = lay_out(
        &manifest,
        &[file(0, "a"), file(1, "a")],
        &BTreeMap::new(),
        None,
    );
    assert!(layout.hidden.is_empty() && layout.notes.into_lines().is_empty());
}

#[test]
fn a_tar_replaces_only_where_the_convention_says_so() {
    let tars = BTreeMap::from([
        (1, listing(&["a", "b", "b"])),
        (2, listing(&["a", "b", "c"])),
    ]);
    let steps = [
        file(0, "a"),
        tar(1, Clash::Replace),
        tar(2, Clash::KeepFirst),
    ];
    let layout = lay_out(&manifest(3), &steps, &tars, None);
    assert_eq!(
        ["a", "b", "c"].map(|path| source(&layout, path)),
        [(1, 0), (1, 1024), (2, 1024)]
    );
    assert_eq!(layout.hidden, BTreeSet::from([0, 2]));
    assert_eq!(layout.notes.into_lines().len(), 4);
}

#[test]
fn a_damaged_tar_is_shown_as_a_blob_and_spoils_the_model_if_it_is_needed() {
    let tars = BTreeMap::from([(0, Err(TarError::TooLarge("100000 members")))]);
    let layout = lay_out(&manifest(1), &[tar(0, Clash::Replace)], &tars, None);
    assert_eq!(layout.hidden, BTreeSet::from([0]));
    assert!(layout.problem.unwrap().contains("100000 members"));
    let optional = Step {
        role: Role::tar(false, 0),
        ..tar(0, Clash::KeepFirst)
    };
    assert_eq!(
        lay_out(&manifest(1), &[optional], &tars, None).problem,
        None
    );
}

#[test]
fn what_is_no_tar_is_the_file_that_its_name_says() {
    let step = |layer, required| Step {
        layer,
        role: Role::Tar {
            required,
            whole_up_to: 0,
            under: Under::Top,
            links: true,
            otherwise: Some(format!("f{layer}")),
        },
        clash: Clash::KeepFirst,
    };
    let bad = || TarError::Undecodable("it is cut off".into());
    let tars = BTreeMap::from([
        (0, Err(TarError::NoTar)),
        (1, Err(bad())),
        (2, Err(TarError::NoTar)),
        (3, Err(bad())),
    ]);
    let steps = [step(0, false), step(1, false), step(2, true), step(3, true)];
    let layout = lay_out(&manifest(4), &steps, &tars, None);
    assert_eq!(layout.paths(), BTreeSet::from(["f0", "f1", "f2"]));
    assert_eq!(layout.hidden, BTreeSet::from([3]));
    assert!(layout.problem.unwrap().contains("cut off"));
    assert_eq!(layout.notes.into_lines().len(), 2);
}

#[test]
fn links_whiteouts_and_hard_links_are_laid_over_each_other() {
    let member = |path: &str, item: Item| Member {
        path: path.into(),
        offset: 512,
        size: u64::from(item == Item::File),
        item,
        stamp: Stamp::default(),
    };
    let layer = |members: Vec<Member>| {
        Ok(Listing {
            form: Form::Compressed,
            entries: members.len(),
            members,
            notes: vec![],
        })
    };
    let link = |target: &str| Item::Symlink(target.into());
    let tars = BTreeMap::from([
        (
            0,
            layer(vec![
                member("usr/bin/a", Item::File),
                member("usr/bin/b", Item::File),
                member("bin", link("usr/bin")),
                member("old/x", Item::File),
                member("old/y/z", Item::File),
                member("becomes-dir", Item::File),
                member("becomes-file/in", Item::File),
                member("hard", Item::HardLink("usr/bin/a".into())),
                member("out", link("../../../../etc/passwd")),
                member("abs", link("/usr/bin/b")),
            ]),
        ),
        (
            1,
            layer(vec![
                member("bin/c", Item::File),
                member("usr/bin/.wh.a", Item::File),
                member("old/.wh..wh..opq", Item::File),
                member("old/new", Item::File),
                member("becomes-dir", Item::Directory),
                member("becomes-dir/now", Item::File),
                member("becomes-file", Item::File),
            ]),
        ),
    ]);
    let steps = [tar(0, Clash::Overlay), tar(1, Clash::Overlay)];
    // The order within a layer says nothing: a whiteout is about the layers below, and a folder's entry may follow its files.
    let mut reversed = tars.clone();
    for listing in reversed.values_mut().flatten() {
        listing.members.reverse();
    }
    let layout = lay_out(&manifest(2), &steps, &reversed, None);
    let forward = lay_out(&manifest(2), &steps, &tars, None);
    let paths = |layout: &Layout| {
        layout
            .paths()
            .into_iter()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(paths(&layout), paths(&forward));
    let layout = forward;
    let shown: Vec<(&str, Option<&str>)> = layout
        .files
        .iter()
        .map(|(path, file)| match &file.source {
            Source::Link(target) => (path.as_str(), Some(target.as_str())),
            _ => (path.as_str(), None),
        })
        .collect();
    assert_eq!(
        shown,
        [
            ("abs", Some("usr/bin/b")),
            ("becomes-dir/now", None),
            ("becomes-file", None),
            ("bin", Some("usr/bin")),
            ("hard", None),
            ("old/new", None),
            ("usr/bin/b", None),
            ("usr/bin/c", None),
        ]
    );
    assert_eq!(layout.problem, None);
    let notes = layout.notes.into_lines();
    assert!(
        notes.len() == 1 && notes[0].contains("left out the link `out`"),
        "{notes:?}"
    );
}

#[test]
fn no_link_puts_a_file_where_none_may_be() {
    let long = "x".repeat(300);
    let deep = "a/".repeat(40);
    let members = |items: &[(&str, Item)]| {
        let member = |(path, item): &(&str, Item)| Member {
            path: (*path).into(),
            offset: 0,
            size: 1,
            item: item.clone(),
            stamp: Stamp::default(),
        };
        Ok(Listing {
            form: Form::Plain,
            members: items.iter().map(member).collect(),
            notes: vec![],
            entries: items.len(),
        })
    };
    let link = |target: &str| Item::Symlink(target.into());
    let below = [
        ("ours", link(".oci")),
        ("long", link(&long)),
        ("deep", link(&deep)),
        ("new", link("made")),
    ];
    let above = [
        ("ours/manifest.json", Item::File),
        ("long/x", Item::File),
        ("deep/x", Item::File),
        ("new/x", Item::File),
        ("ours/d", Item::Directory),
    ];
    let tars = BTreeMap::from([(0, members(&below)), (1, members(&above))]);
    let steps = [tar(0, Clash::Overlay), tar(1, Clash::Overlay)];
    let layout = lay_out(&manifest(2), &steps, &tars, None);
    let files: Vec<&str> = layout.files.keys().map(String::as_str).collect();
    assert_eq!(files, ["made/x", "new"]);
    assert!(
        !layout
            .directories
            .iter()
            .any(|path| path.starts_with(".oci"))
    );
}

#[test]
fn too_many_files_are_a_problem() {
    let paths: Vec<String> = (0..MOST_FILES / 2 + 1).map(|n| n.to_string()).collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    let below: Vec<String> = paths.iter().map(|path| format!("x/{path}")).collect();
    let below: Vec<&str> = below.iter().map(String::as_str).collect();
    let tars = BTreeMap::from([(0, listing(&paths)), (1, listing(&below))]);
    let layout = lay_out(
        &manifest(2),
        &[tar(0, Clash::Replace), tar(1, Clash::Replace)],
        &tars,
        None,
    );
    assert!(layout.problem.unwrap().contains("200000 files"));
}

proptest! {
    #[test]
    fn no_path_lies_below_another_and_every_layer_is_seen(
        steps in proptest::collection::vec(("[ab]{1}(/[ab]{1}){0,3}", any::<bool>()), 1..12),
    ) {
        let manifest = manifest(steps.len());
        let steps: Vec<Step> = steps.iter().enumerate().map(|(n, (name, replace))| {
            Step { clash: if *replace { Clash::Replace } else { Clash::KeepFirst }, ..file(n, name) }
        }).collect();
        let layout = lay_out(&manifest, &steps, &BTreeMap::new(), None);
        for path in layout.files.keys() {
            prop_assert!(ancestors(path).all(|parent| !layout.files.contains_key(parent)));
        }
        let shown: BTreeSet<usize> = layout.files.keys().map(|path| source(&layout, path).0).chain(layout.hidden.iter().copied()).collect();
        prop_assert_eq!(shown.len(), steps.len());
    }
}

#[test]
fn directories_that_a_tar_has_for_themselves_are_there() {
    let member = |path: &str, item: Item| Member {
        path: path.into(),
        offset: 0,
        size: 0,
        item,
        stamp: Stamp::default(),
    };
    let layer = |members: Vec<Member>| {
        Ok(Listing {
            form: Form::Plain,
            entries: members.len(),
            members,
            notes: vec![],
        })
    };
    let tars = BTreeMap::from([
        (
            0,
            layer(vec![
                member("full", Item::Directory),
                member("full/file", Item::File),
                member("empty/below", Item::Directory),
                member("gone", Item::Directory),
                member("emptied/file", Item::File),
                member("usr/lib", Item::Directory),
                member("lib", Item::Symlink("usr/lib".into())),
                member("file", Item::File),
            ]),
        ),
        (
            1,
            layer(vec![
                member(".wh.gone", Item::File),
                member("emptied/.wh.file", Item::File),
                member("lib/new", Item::Directory),
                member("file", Item::Directory),
            ]),
        ),
    ]);
    let steps = [tar(0, Clash::Overlay), tar(1, Clash::Overlay)];
    let layout = lay_out(&manifest(2), &steps, &tars, None);
    assert_eq!(
        layout.empty_directories(),
        ["emptied", "empty/below", "file", "usr/lib/new"]
    );
    assert_eq!(layout.paths(), BTreeSet::from(["full/file", "lib"]));

    // In an artifact the first stays, and files that come later find their places taken.
    let tars = BTreeMap::from([(
        0,
        layer(vec![
            member("a", Item::Directory),
            member("b", Item::File),
            member("b", Item::Directory),
        ]),
    )]);
    let steps = [file(1, "b"), tar(0, Clash::KeepFirst), file(2, "a")];
    let layout = lay_out(&manifest(3), &steps, &tars, None);
    assert_eq!(layout.empty_directories(), ["a"]);
    assert_eq!(source(&layout, "b"), (1, 0));
    assert_eq!(layout.hidden, BTreeSet::from([2]));
}
