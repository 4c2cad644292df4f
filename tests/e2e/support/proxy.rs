//! A proxy in front of a registry that counts what is asked for and sent, and lies when it is told to.

use std::io::{BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::http::{Head, Listener, copy_chunked, response};

/// What the proxy does in place of, or to, an honest answer.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Answers this status with these headers and a short body, without asking the registry.
    Status(u16, Vec<(String, String)>),
    /// Waits before it asks the registry.
    Delay(Duration),
    /// Sends the body at this many bytes a second.
    Throttle(u64),
    /// Resets the connection after this many bytes of the body.
    Reset(u64),
    /// Closes the connection in good order after this many bytes of the body.
    Truncate(u64),
    /// Sends this many bytes of the body and then nothing, with the connection open.
    Stall(u64),
    /// Flips all bits of the byte at this offset of the blob.
    Corrupt(u64),
    /// Says a Content-Range that begins this much later than the bytes sent.
    ShiftRange(u64),
    /// Sends the bytes that begin this much earlier, where there are such, under the Content-Range that was asked for.
    ShiftBytes(u64),
    /// Keeps the Range header from the registry, which then answers 200 with the whole blob.
    IgnoreRange,
    /// Redirects to the same place with another query, without end.
    RedirectLoop,
    /// Redirects to this URL, followed by the request's path.
    RedirectTo(String),
    /// Sends this content type and body with status 200, the registry's digest header included.
    Replace(String, Arc<Vec<u8>>),
    /// Sends a JSON manifest of this size that never says anything, with status 200.
    Huge(u64),
    /// Adds bytes behind the body and counts them in Content-Length.
    Longer(u64),
}

/// Which requests a fault is for, and how many of them.
struct Rule {
    path: String,
    fault: Fault,
    skip: usize,
    left: usize,
}

/// One request, as the proxy saw it.
#[derive(Clone, Debug)]
pub struct Record {
    pub method: String,
    pub path: String,
    pub range: Option<String>,
    pub authorized: bool,
    pub status: u16,
    /// Body bytes sent to the client.
    pub sent: u64,
    /// Body bytes received from the client, when their number was announced.
    pub received: u64,
}

struct Shared {
    upstream: SocketAddr,
    rules: Mutex<Vec<Rule>>,
    records: Mutex<Vec<Record>>,
    active: AtomicUsize,
    peak: AtomicUsize,
}

/// The proxy; ends when dropped.
pub struct Proxy {
    listener: Listener,
    shared: Arc<Shared>,
}

impl Proxy {
    /// In front of the server at `upstream`.
    pub fn start(upstream: SocketAddr) -> Self {
        let shared = Arc::new(Shared {
            upstream,
            rules: Mutex::default(),
            records: Mutex::default(),
            active: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
        });
        let state = shared.clone();
        Self {
            listener: Listener::start(move |stream, stop| state.connection(stream, stop)),
            shared,
        }
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        self.listener.address.to_string()
    }

    pub fn address(&self) -> SocketAddr {
        self.listener.address
    }

    /// Every request whose path contains `path` meets `fault` from now on.
    pub fn always(&self, path: &str, fault: Fault) {
        self.after(path, 0, usize::MAX, fault);
    }

    /// The next `times` requests whose path contains `path` meet `fault`.
    pub fn times(&self, path: &str, times: usize, fault: Fault) {
        self.after(path, 0, times, fault);
    }

    /// Lets `skip` such requests pass first.
    pub fn after(&self, path: &str, skip: usize, times: usize, fault: Fault) {
        self.shared.rules.lock().unwrap().push(Rule {
            path: path.to_owned(),
            fault,
            skip,
            left: times,
        });
    }

    /// Honest again about this path alone.
    pub fn forget(&self, path: &str) {
        let mut rules = self.shared.rules.lock().unwrap();
        rules.retain(|rule| rule.path != path);
    }

    /// Honest again.
    pub fn behave(&self) {
        self.shared.rules.lock().unwrap().clear();
    }

    /// Forgets what was recorded.
    pub fn reset(&self) {
        self.shared.records.lock().unwrap().clear();
        self.shared.peak.store(0, Ordering::Relaxed);
    }

    /// What was asked since the last reset, in order of completion.
    pub fn records(&self) -> Vec<Record> {
        self.shared.records.lock().unwrap().clone()
    }

    /// The requests whose path contains `path`.
    pub fn count(&self, path: &str) -> usize {
        self.records()
            .iter()
            .filter(|record| record.path.contains(path))
            .count()
    }

    /// Body bytes sent for paths that contain `path`.
    pub fn sent(&self, path: &str) -> u64 {
        self.records()
            .iter()
            .filter(|record| record.path.contains(path))
            .map(|record| record.sent)
            .sum()
    }

    /// The most requests that were under way at once.
    pub fn peak(&self) -> usize {
        self.shared.peak.load(Ordering::Relaxed)
    }

    /// Waits until no request is under way, so that the counts are final.
    pub fn settle(&self) {
        super::eventually(super::PATIENCE, "the proxy becomes idle", || {
            for _ in 0..10 {
                if self.shared.active.load(Ordering::SeqCst) > 0 {
                    return None;
                }
                std::thread::sleep(Duration::from_millis(20));
            }
            Some(())
        });
    }
}

/// Counts a request's body as it is sent; the count stands however the request ends.
struct Counted<'a> {
    shared: &'a Shared,
    index: usize,
}

impl Counted<'_> {
    fn update(&self, change: impl FnOnce(&mut Record)) {
        // The record is gone when the test has reset the counts meanwhile.
        if let Some(record) = self.shared.records.lock().unwrap().get_mut(self.index) {
            change(record);
        }
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.shared.active.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Shared {
    fn connection(&self, stream: TcpStream, stop: &AtomicBool) {
        let Ok(clone) = stream.try_clone() else {
            return;
        };
        let mut reader = BufReader::new(clone);
        let mut writer = stream;
        while !stop.load(Ordering::Relaxed) {
            let Some(request) = Head::read(&mut reader) else {
                return;
            };
            let counted = self.begin(&request);
            match self.exchange(&request, &mut reader, &mut writer, stop, &counted) {
                Ok(true) => {}
                Ok(false) | Err(_) => return,
            }
        }
    }

    fn begin(&self, request: &Head) -> Counted<'_> {
        let active = self.active.fetch_add(1, Ordering::SeqCst) + 1;
        self.peak.fetch_max(active, Ordering::Relaxed);
        let mut records = self.records.lock().unwrap();
        records.push(Record {
            method: request.method().to_owned(),
            path: request.target().to_owned(),
            range: request.get("range").map(str::to_owned),
            authorized: request.get("authorization").is_some(),
            status: 0,
            sent: 0,
            received: request.length().unwrap_or(0),
        });
        Counted {
            shared: self,
            index: records.len() - 1,
        }
    }

    /// The faults for this request, each counted as used.
    fn faults(&self, path: &str) -> Vec<Fault> {
        let mut rules = self.rules.lock().unwrap();
        let mut faults = Vec::new();
        for rule in rules.iter_mut().filter(|rule| path.contains(&rule.path)) {
            if rule.skip > 0 {
                rule.skip -= 1;
            } else if rule.left > 0 {
                rule.left -= 1;
                faults.push(rule.fault.clone());
            }
        }
        faults
    }

    /// One request and its answer; false when the connection cannot be used again.
    fn exchange(
        &self,
        request: &Head,
        reader: &mut BufReader<TcpStream>,
        writer: &mut TcpStream,
        stop: &AtomicBool,
        counted: &Counted<'_>,
    ) -> std::io::Result<bool> {
        let faults = self.faults(request.target());
        let mut forwarded = request.clone();
        let mut shift_bytes = 0;
        for fault in &faults {
            match fault {
                Fault::Delay(time) => pause(*time, stop),
                Fault::IgnoreRange => forwarded.remove("range"),
                Fault::ShiftBytes(by) => shift_bytes = *by,
                Fault::Status(status, headers) => {
                    let headers: Vec<_> = headers
                        .iter()
                        .map(|(n, v)| (n.as_str(), v.as_str()))
                        .collect();
                    counted.update(|record| record.status = *status);
                    writer.write_all(&response(
                        *status,
                        &headers,
                        if request.method() == "HEAD" {
                            b""
                        } else {
                            b"{}"
                        },
                    ))?;
                    return Ok(request.length().is_none());
                }
                Fault::RedirectLoop => {
                    let (path, query) = request
                        .target()
                        .split_once('?')
                        .unwrap_or((request.target(), "0"));
                    let next = query.parse::<u64>().unwrap_or(0) + 1;
                    counted.update(|record| record.status = 307);
                    writer.write_all(&response(
                        307,
                        &[("Location", &format!("{path}?{next}"))],
                        b"",
                    ))?;
                    return Ok(true);
                }
                Fault::RedirectTo(base) => {
                    counted.update(|record| record.status = 307);
                    writer.write_all(&response(
                        307,
                        &[("Location", &format!("{base}{}", request.target()))],
                        b"",
                    ))?;
                    return Ok(true);
                }
                _ => {}
            }
        }
        if shift_bytes > 0
            && let Some((start, end)) = forwarded.get("range").and_then(parse_range)
            && start >= shift_bytes
        {
            forwarded.set(
                "range",
                format!("bytes={}-{}", start - shift_bytes, end - shift_bytes),
            );
        }

        let mut upstream = TcpStream::connect(self.upstream)?;
        upstream.set_nodelay(true)?;
        upstream.set_read_timeout(Some(Duration::from_secs(120)))?;
        forwarded.set("Connection", "close");
        upstream.write_all(&forwarded.encode())?;
        if request.get("expect").is_some() {
            writer.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        if request.is_chunked() {
            copy_chunked(reader, &mut upstream)?;
        } else if let Some(length) = request.length() {
            std::io::copy(&mut reader.take(length), &mut upstream)?;
        }
        let mut answer = BufReader::new(upstream);
        let mut head = Head::read(&mut answer).ok_or(std::io::ErrorKind::UnexpectedEof)?;
        while head.status() == 100 {
            head = Head::read(&mut answer).ok_or(std::io::ErrorKind::UnexpectedEof)?;
        }
        self.answer(request, head, answer, writer, &faults, stop, counted)
    }

    #[allow(clippy::too_many_arguments)] // the parts of one exchange, used once
    fn answer(
        &self,
        request: &Head,
        mut head: Head,
        mut body: BufReader<TcpStream>,
        writer: &mut TcpStream,
        faults: &[Fault],
        stop: &AtomicBool,
        counted: &Counted<'_>,
    ) -> std::io::Result<bool> {
        counted.update(|record| record.status = head.status());
        head.remove("connection");
        let succeeded = matches!(head.status(), 200 | 206);
        let mut length = head.length();
        let start = head
            .get("content-range")
            .and_then(parse_range)
            .map_or(0, |(start, _)| start);
        let (mut rate, mut corrupt, mut extra) = (None, None, 0);
        // Where the body ends early, and how.
        let mut cut: Option<(u64, &Fault)> = None;
        // What is not there can only be replaced.
        let applies = |fault: &&Fault| succeeded || matches!(fault, Fault::Replace(..));
        for fault in faults.iter().filter(applies) {
            match fault {
                Fault::Throttle(bytes) => rate = Some(*bytes),
                Fault::Corrupt(offset) => corrupt = Some(*offset),
                Fault::Reset(at) | Fault::Truncate(at) | Fault::Stall(at) => {
                    cut = Some((*at, fault))
                }
                Fault::Longer(by) => {
                    extra = *by;
                    if let Some(length) = length {
                        head.set("Content-Length", length + extra);
                    }
                }
                Fault::ShiftRange(by) => {
                    if let Some((first, last)) = head.get("content-range").and_then(parse_range) {
                        let total = head
                            .get("content-range")
                            .and_then(|v| v.split('/').nth(1))
                            .unwrap_or("*")
                            .to_owned();
                        head.set(
                            "Content-Range",
                            format!("bytes {}-{}/{total}", first + by, last + by),
                        );
                    }
                }
                Fault::ShiftBytes(_) => {
                    if let (Some((first, last)), Some((_, total))) = (
                        request.get("range").and_then(parse_range),
                        head.get("content-range")
                            .and_then(|value| value.split_once('/')),
                    ) {
                        let total = total.to_owned();
                        head.set("Content-Range", format!("bytes {first}-{last}/{total}"));
                    }
                }
                Fault::Replace(media_type, content) => {
                    head.first = "HTTP/1.1 200 OK".to_owned();
                    head.remove("content-range");
                    head.set("Content-Type", media_type);
                    head.set("Content-Length", content.len());
                    writer.write_all(&head.encode())?;
                    if request.method() != "HEAD" {
                        writer.write_all(content)?;
                        counted.update(|record| record.sent += content.len() as u64);
                    }
                    return Ok(true);
                }
                Fault::Huge(size) => {
                    head.set("Content-Length", size);
                    writer.write_all(&head.encode())?;
                    if request.method() == "HEAD" {
                        return Ok(true);
                    }
                    let block = vec![b' '; 1 << 16];
                    let mut left = *size;
                    while left > 0 {
                        let now = left.min(block.len() as u64);
                        writer.write_all(&block[..now as usize])?;
                        counted.update(|record| record.sent += now);
                        left -= now;
                    }
                    return Ok(true);
                }
                _ => {}
            }
        }
        if length.is_none() && request.method() != "HEAD" {
            head.set("Connection", "close");
        }
        writer.write_all(&head.encode())?;
        if request.method() == "HEAD" || matches!(head.status(), 204 | 304) {
            return Ok(true);
        }

        let began = Instant::now();
        let mut block = vec![0; 64 << 10];
        let mut sent = 0;
        loop {
            let mut room = block.len() as u64;
            if let Some(left) = length {
                room = room.min(left);
            }
            if let Some((at, fault)) = cut {
                if sent >= at {
                    return self.end(writer, fault, stop);
                }
                room = room.min(at - sent);
            }
            if let Some(rate) = rate {
                room = room.min((rate / 20).max(1));
                let due = Duration::from_secs_f64(sent as f64 / rate as f64);
                pause(due.saturating_sub(began.elapsed()), stop);
            }
            if stop.load(Ordering::Relaxed) {
                return Ok(false);
            }
            let read = if room == 0 {
                0
            } else {
                body.read(&mut block[..room as usize])?
            };
            if read == 0 {
                break;
            }
            if let Some(offset) = corrupt
                && let Some(at) = offset.checked_sub(start + sent)
                && at < read as u64
            {
                block[at as usize] ^= 0xFF;
            }
            writer.write_all(&block[..read])?;
            sent += read as u64;
            counted.update(|record| record.sent += read as u64);
            if let Some(left) = &mut length {
                *left -= read as u64;
            }
        }
        writer.write_all(&vec![0; extra as usize])?;
        // A body of known length that came short (as docker-registry's 416 does) cannot be told from the next answer.
        Ok(length == Some(0))
    }

    /// Ends a body early.
    fn end(&self, writer: &TcpStream, fault: &Fault, stop: &AtomicBool) -> std::io::Result<bool> {
        match fault {
            Fault::Stall(_) => {
                let mut byte = [0];
                writer.set_read_timeout(Some(Duration::from_millis(100)))?;
                // Until the client has enough of it.
                while !stop.load(Ordering::Relaxed) {
                    match writer.peek(&mut byte) {
                        Ok(0) => break,
                        Ok(_) => std::thread::sleep(Duration::from_millis(100)),
                        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                        Err(_) => break,
                    }
                }
            }
            Fault::Reset(_) => {
                // Closing with a linger time of zero sends RST.
                rustix::net::sockopt::set_socket_linger(writer, Some(Duration::ZERO))?;
            }
            _ => {}
        }
        Ok(false)
    }
}

/// Sleeps in small steps, so that a proxy that is dropped ends soon.
fn pause(time: Duration, stop: &AtomicBool) {
    let end = Instant::now() + time;
    while Instant::now() < end && !stop.load(Ordering::Relaxed) {
        std::thread::sleep((end - Instant::now()).min(Duration::from_millis(50)));
    }
}

/// `bytes=A-B` or `bytes A-B/N`.
pub fn parse_range(text: &str) -> Option<(u64, u64)> {
    let (first, last) = text
        .strip_prefix("bytes")?
        .trim_start_matches(['=', ' '])
        .split('/')
        .next()?
        .split_once('-')?;
    Some((first.parse().ok()?, last.parse().ok()?))
}
