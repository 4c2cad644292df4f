//! `ocifs umount`.

use std::time::Duration;

use anyhow::Result;

use super::args::{Global, Umount};
use super::context;
use super::exit::Exit;
use super::progress::eprint;
use crate::config::Values;
use crate::mount;

/// How long the daemon may take to end once its mount is gone.
const PATIENCE: Duration = Duration::from_secs(15);

pub(super) fn run(global: &Global, args: &Umount) -> Result<Exit> {
    let settings = context::settings(global, Values::default())?;
    let how = match (args.force, args.lazy) {
        (true, _) => mount::Umount::Force,
        (false, true) => mount::Umount::Lazy,
        (false, false) => mount::Umount::Normal,
    };
    // A lazy one waits for nobody.
    let patience = if how == mount::Umount::Normal {
        PATIENCE
    } else {
        Duration::from_secs(1)
    };
    let unmounted = mount::unmount(&args.mountpoint, how, &settings.runtime_dir, patience)?;
    if let Some(pid) = unmounted.still_running {
        let path = unmounted.path.display();
        eprint(&format!(
            "{path} is out of the tree; process {pid} ends when the last file below it is closed"
        ));
    }
    Ok(Exit::Ok)
}
