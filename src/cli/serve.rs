//! `ocifs serve`.

use anyhow::{Context as _, Result};

use super::args::Serve;
use super::exit::Exit;
use super::interrupt::interrupted;
use super::{context, output};
use crate::base::ByteSize;
use crate::serve::Server;

pub(super) fn run(args: &Serve) -> Result<Exit> {
    context::runtime()?.block_on(async {
        let server = Server::bind(&args.layout, args.listen).await;
        let server = server.with_context(|| {
            format!("cannot serve {} on {}", args.layout.display(), args.listen)
        })?;
        let (addr, stats) = (server.addr(), server.stats());
        output::line(format_args!(
            "serving {} on http://{addr}/v2/",
            args.layout.display()
        ))?;
        server.run(interrupted()).await;
        let total = stats.total();
        tracing::info!(
            "sent {} in {} blob requests",
            ByteSize(total.bytes),
            total.requests
        );
        // To be ended by a signal is how a server is used.
        Ok(Exit::Ok)
    })
}
