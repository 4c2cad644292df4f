//! What the fuzzer calls. A panic is a finding.

use super::control::{Request, Response};
use super::mountinfo;

/// Lines of the control socket, in both directions; a request that is printed is read as the same.
pub fn control(data: &[u8]) {
    if let Ok(request) = serde_json::from_slice::<Request>(data) {
        let printed = serde_json::to_string(&request).expect("keys are texts");
        assert!(!printed.contains('\n'));
        let again: Request = serde_json::from_str(&printed).expect("it was printed by us");
        assert_eq!(again, request);
    }
    let _ = serde_json::from_slice::<Response>(data);
}

/// A line of the kernel's table of mounts: others choose the paths in it.
pub fn mountinfo(data: &[u8]) {
    if let Some(mount) = mountinfo::parse(data) {
        assert!(mount.path.as_os_str().len() <= data.len());
    }
}
