//! The journal: any records, cut off anywhere, are the state before the one that was cut.

use proptest::prelude::*;

use super::*;
use crate::base::Digest;
use crate::cache::Identity;
use crate::registry::{Reference, Repository, Tag};
use crate::tree::node::{Folder, Place};

fn text() -> impl Strategy<Value = String> {
    "[a-zé/ ]{0,12}"
}

fn repository() -> impl Strategy<Value = Repository> {
    let hosts = prop::sample::select(vec!["r.example", "localhost:5000", "docker.io"]);
    let paths = prop::sample::select(vec!["m", "org/m", "a/b/c"]);
    (hosts, paths).prop_map(|(host, path)| Repository::new(host, path).unwrap())
}

fn digest() -> impl Strategy<Value = Digest> {
    (0_u8..4).prop_map(|number| Digest::of(&[number]))
}

fn tag() -> impl Strategy<Value = Tag> {
    prop::sample::select(vec!["latest", "v1", "V_2.x-y"]).prop_map(|tag| tag.parse().unwrap())
}

fn reference() -> impl Strategy<Value = Reference> {
    prop_oneof![
        (repository(), tag()).prop_map(|(repository, tag)| Reference::tagged(repository, tag)),
        (repository(), digest())
            .prop_map(|(repository, digest)| Reference::pinned(repository, digest)),
    ]
}

fn kept() -> impl Strategy<Value = Kept> {
    let place = prop_oneof![
        (repository(), tag()).prop_map(|(repository, tag)| Place::Tagged(repository, tag)),
        (repository(), digest()).prop_map(|(repository, digest)| Place::Pinned(repository, digest)),
        repository().prop_map(Place::Latest),
    ];
    prop_oneof![
        text().prop_map(Kept::Host),
        (text(), text()).prop_map(|(host, path)| Kept::Folder(Folder { host, path })),
        (place, text()).prop_map(|(place, path)| Kept::Directory { place, path }),
        (repository(), digest(), text(), any::<bool>()).prop_map(
            |(repository, digest, path, direct)| Kept::File {
                repository,
                digest,
                path,
                direct
            }
        ),
        (text(), text(), text()).prop_map(|(directory, name, target)| Kept::Link {
            directory,
            name,
            target
        }),
    ]
}

fn stale() -> impl Strategy<Value = Stale> {
    prop_oneof![
        (2_u64..8, text()).prop_map(|(parent, name)| Stale::Entry { parent, name }),
        (2_u64..8).prop_map(Stale::Attributes),
        (2_u64..8).prop_map(Stale::Content),
        digest().prop_map(Stale::Blob),
    ]
}

fn record() -> impl Strategy<Value = Record> {
    let (id, handle, debt) = (2_u64..8, 1_u64..8, 1_u64..5);
    let names = prop::option::of(prop::collection::vec(text(), 0..4));
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..20).prop_map(Record::Session),
        text().prop_map(|reason| Record::TakenOver { reason }),
        (id.clone(), 1_u64..4, kept()).prop_map(|(id, count, node)| Record::Told {
            id,
            count,
            node
        }),
        id.clone().prop_map(|id| Record::Again { id }),
        (id.clone(), 0_u64..4).prop_map(|(id, count)| Record::Forgot { id, count }),
        (reference(), digest()).prop_map(|(reference, digest)| Record::Bound { reference, digest }),
        reference().prop_map(|reference| Record::Unbound { reference }),
        (handle.clone(), id.clone(), any::<u64>(), 0..9_i32).prop_map(
            |(handle, node, unique, backing)| Record::Opened {
                handle,
                node,
                unique,
                backing
            }
        ),
        (handle.clone(), id, any::<u64>(), names).prop_map(|(handle, node, unique, names)| {
            Record::Listed {
                handle,
                node,
                unique,
                names,
            }
        }),
        handle.prop_map(|handle| Record::Closed { handle }),
        (any::<u64>(), 0..9_i32).prop_map(|(handle, backing)| Record::Highest { handle, backing }),
        (any::<u64>(), text()).prop_map(|(times, reason)| Record::Times { times, reason }),
        (debt.clone(), prop::collection::vec(stale(), 0..4))
            .prop_map(|(debt, what)| Record::Owed { debt, what }),
        debt.prop_map(|debt| Record::Settled { debt }),
        (digest(), prop::option::of(any::<[u64; 3]>())).prop_map(|(blob, file)| Record::Given {
            blob,
            file: file.map(Identity::from_numbers)
        }),
    ]
}

fn descriptor(journal: &Journal) -> OwnedFd {
    journal.descriptor().try_clone_to_owned().unwrap()
}

fn resumed(journal: &Journal) -> (Journal, State) {
    Journal::resume(descriptor(journal)).unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn records_cut_off_anywhere_come_to_what_was_before(records in prop::collection::vec(record(), 0..20)) {
        // The state, and the length of the bytes, after each record.
        let (mut bytes, mut state) = (Vec::new(), State::default());
        let mut after = vec![(0, state.clone())];
        for record in &records {
            record::put(&mut bytes, record);
            state.apply(record.clone());
            after.push((bytes.len(), state.clone()));
        }
        for cut in 0..=bytes.len() {
            let (length, expected) = after.iter().rfind(|(length, _)| *length <= cut).unwrap();
            let (state, at) = replay(&bytes[..cut]);
            prop_assert_eq!(at, *length);
            prop_assert_eq!(&state, expected);
        }
    }

    #[test]
    fn a_state_written_anew_is_the_same(records in prop::collection::vec(record(), 0..40)) {
        let mut state = State::default();
        records.into_iter().for_each(|record| state.apply(record));
        let mut again = State::default();
        state.records().for_each(|record| again.apply(record));
        prop_assert_eq!(again, state);
    }

    #[test]
    fn no_bytes_are_too_strange(bytes in prop::collection::vec(any::<u8>(), 0..200), sound in any::<bool>()) {
        let mut framed = Vec::new();
        if sound {
            framed.extend((bytes.len() as u32).to_le_bytes());
            framed.extend(crc32c::crc32c(&bytes).to_le_bytes());
        }
        framed.extend(&bytes);
        let _ = replay(&framed);
    }

    #[test]
    fn a_journal_goes_on_where_it_was_cut_off(
        first in prop::collection::vec(record(), 1..10),
        second in prop::collection::vec(record(), 0..10),
        cut in 0_u64..4000,
    ) {
        let journal = Journal::new().unwrap();
        first.iter().for_each(|record| journal.write(record));
        let end = lock(&journal.place).end;
        journal.file.set_len(end - cut.min(end - PAGE)).unwrap();
        let (next, mut state) = resumed(&journal);
        second.iter().for_each(|record| next.write(record));
        second.into_iter().for_each(|record| state.apply(record));
        let (_, found) = resumed(&next);
        prop_assert_eq!(found, state);
    }
}

#[test]
fn what_was_cut_off_is_not_read_behind_a_shorter_record() {
    let journal = Journal::new().unwrap();
    // A text in which a whole record is hidden, in a record that is not whole.
    let mut hidden = Vec::new();
    record::put(&mut hidden, &Record::Closed { handle: 7 });
    let mut session = vec![0; 5];
    session.extend(&hidden);
    session.extend([0; 9]);
    journal.session(&session);
    let end = lock(&journal.place).end;
    journal.file.set_len(end - 1).unwrap();
    let (journal, state) = resumed(&journal);
    assert_eq!(state, State::default());
    assert_eq!(journal.file.metadata().unwrap().len(), PAGE);
}

#[test]
fn it_stays_as_short_as_what_it_comes_to() {
    use std::os::unix::fs::MetadataExt as _;

    let journal = Journal::new().unwrap();
    journal.session(b"session");
    let node = Kept::Host("r.example".into());
    for round in 0..40_000 {
        let id = 2 + round % 100;
        let node = node.clone();
        journal.write(&Record::Told { id, count: 1, node });
        journal.write(&Record::Opened {
            handle: round + 1,
            node: id,
            unique: round,
            backing: 0,
        });
        journal.write(&Record::Closed { handle: round + 1 });
        if round % 100 != 0 {
            journal.write(&Record::Forgot { id, count: 1 });
        }
    }
    assert!(journal.is_whole());
    let allocated = journal.file.metadata().unwrap().blocks() * 512;
    assert!(allocated <= 2 * SHORT, "{allocated}");
    let (_, state) = resumed(&journal);
    assert_eq!(state.session(), b"session");
    assert_eq!((state.nodes.len(), state.open.len()), (1, 0));
    assert_eq!(state.highest_handle, 40_000);
}

#[test]
fn what_is_no_journal_or_lacks_something_is_refused() {
    let refused = |file: File| Journal::resume(file.into()).unwrap_err().to_string();
    let empty = || File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
    assert!(!refused(empty()).is_empty());
    let file = empty();
    file.write_all_at(&[7; 4096], 0).unwrap();
    assert!(refused(file).contains("no journal"));
    let journal = Journal::new().unwrap();
    journal
        .file
        .write_all_at(&(FORMAT + 1).to_le_bytes(), FORMAT_AT)
        .unwrap();
    assert!(refused(descriptor(&journal).into()).contains("format 4"));

    let journal = Journal::new().unwrap();
    journal.session(b"session");
    journal.abandon();
    journal.session(b"again");
    assert!(!journal.is_whole());
    assert!(refused(descriptor(&journal).into()).contains("lacks"));

    // A file that cannot grow: nothing is half kept.
    let file = memfd_create("test", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let journal = Journal::begin(file.into()).unwrap();
    rustix::fs::fcntl_add_seals(&journal.file, rustix::fs::SealFlags::GROW).unwrap();
    assert!(journal.is_whole());
    journal.session(b"lost");
    assert!(!journal.is_whole());
    journal.session(b"lost as well");
    assert!(refused(descriptor(&journal).into()).contains("lacks"));
}
