//! The least that a client can do for a range: one connection that stays open, one request after the other.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;

/// Reads these ranges of `path`, each an offset and a length, over one connection; returns the bytes of all bodies.
pub(crate) fn ranges(address: &str, path: &str, places: &[(u64, u64)]) -> u64 {
    let stream = TcpStream::connect(address).unwrap();
    stream.set_nodelay(true).unwrap();
    let mut answers = BufReader::with_capacity(256 << 10, stream.try_clone().unwrap());
    let mut requests = stream;
    let mut body = Vec::new();
    let mut sum = 0;
    for (offset, length) in places {
        let last = offset + length - 1;
        let request = format!(
            "GET {path} HTTP/1.1\r\nHost: {address}\r\nRange: bytes={offset}-{last}\r\n\r\n"
        );
        requests.write_all(request.as_bytes()).unwrap();
        let mut line = String::new();
        answers.read_line(&mut line).unwrap();
        assert!(line.starts_with("HTTP/1.1 206"), "{line}");
        let mut size = None;
        while line != "\r\n" {
            line.clear();
            answers.read_line(&mut line).unwrap();
            if let Some((name, value)) = line.split_once(':')
                && name.eq_ignore_ascii_case("content-length")
            {
                size = value.trim().parse::<u64>().ok();
            }
        }
        assert_eq!(size, Some(*length));
        body.resize(*length as usize, 0);
        answers.read_exact(&mut body).unwrap();
        sum += length;
    }
    sum
}
