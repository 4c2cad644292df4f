//! A way to a server that can die without a word, as a NAT forgets connections or a link goes down: what is sent is taken, and
//! nothing ever comes back. New connections go through again once they are let.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use super::http::Listener;

/// Ends when dropped.
pub struct Freezer {
    listener: Listener,
    shared: Arc<Shared>,
}

#[derive(Default)]
struct Shared {
    /// Connections that were made before this many of them had been are dead.
    dead: AtomicUsize,
    made: AtomicUsize,
    /// New ones die as well.
    closed: AtomicBool,
    /// What is sent is answered by RST, not by silence.
    resets: AtomicBool,
}

impl Shared {
    fn is_dead(&self, number: usize) -> bool {
        number < self.dead.load(Ordering::SeqCst)
    }
}

impl Freezer {
    /// In front of the server at `to`.
    pub fn start(to: SocketAddr) -> Self {
        let shared = Arc::new(Shared::default());
        let state = shared.clone();
        let listener = Listener::start(move |stream, stop| {
            let number = state.made.fetch_add(1, Ordering::SeqCst);
            if state.closed.load(Ordering::SeqCst) {
                state.dead.fetch_max(number + 1, Ordering::SeqCst);
            }
            let Ok(upstream) = TcpStream::connect(to) else {
                return;
            };
            let pair = || Some((stream.try_clone().ok()?, upstream.try_clone().ok()?));
            let (Some((down, up)), Some((from_below, to_above))) = (pair(), pair()) else {
                return;
            };
            let back = state.clone();
            std::thread::spawn(move || copy(up, down, &back, number));
            copy(from_below, to_above, &state, number);
            while state.is_dead(number)
                && !state.resets.load(Ordering::SeqCst)
                && !stop.load(Ordering::Relaxed)
            {
                std::thread::sleep(Duration::from_millis(50));
            }
        });
        Self { listener, shared }
    }

    /// `127.0.0.1:PORT`.
    pub fn host(&self) -> String {
        self.listener.address.to_string()
    }

    /// All connections that there are die without a word. New ones live.
    pub fn freeze(&self) {
        let made = self.shared.made.load(Ordering::SeqCst);
        self.shared.dead.store(made, Ordering::SeqCst);
    }

    /// New connections die as well from now on, or live again.
    pub fn close(&self, closed: bool) {
        self.shared.closed.store(closed, Ordering::SeqCst);
    }

    /// Connections made so far.
    pub fn made(&self) -> usize {
        self.shared.made.load(Ordering::SeqCst)
    }

    /// Dead connections answer by RST from now on.
    pub fn reset(&self) {
        self.shared.resets.store(true, Ordering::SeqCst);
    }
}

/// Bytes go on while the connection lives.
fn copy(mut from: TcpStream, mut to: TcpStream, shared: &Shared, number: usize) {
    let mut buffer = vec![0; 64 << 10];
    loop {
        match from.read(&mut buffer) {
            _ if shared.is_dead(number) => {
                if shared.resets.load(Ordering::SeqCst) {
                    for stream in [&from, &to] {
                        let _ =
                            rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO));
                    }
                    return;
                }
                // What comes is taken, and says nothing.
                if !matches!(from.read(&mut buffer), Ok(length) if length > 0) {
                    return;
                }
            }
            Ok(0) | Err(_) => break,
            Ok(length) => {
                if to.write_all(&buffer[..length]).is_err() {
                    break;
                }
            }
        }
    }
    if !shared.is_dead(number) {
        drop(to.shutdown(Shutdown::Write));
    }
}
