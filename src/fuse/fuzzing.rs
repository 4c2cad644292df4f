//! What the fuzzer calls. A panic is a finding.

use super::request::{Header, Message, Operation};

/// A message as it comes from the device: one that is understood lies in what came.
pub fn request(data: &[u8]) {
    let Ok((header, body)) = Header::parse(data) else {
        return;
    };
    assert!(body.len() + 40 <= data.len());
    match header.message(body) {
        Ok(Message::Forget(forgets)) => {
            assert!(forgets.iter().count() <= 1 + body.len() / 16);
        }
        Ok(Message::Ask(Operation::Lookup { name } | Operation::GetXattr { name, .. })) => {
            assert!(!name.is_empty() && !name.contains(&0) && name.len() < body.len());
        }
        Ok(_) | Err(_) => {}
    }
}
