//! What names, sizes and listings cost: few requests in a row at first, none later.

use std::time::{Duration, Instant};

use crate::support::model::SampleModel;
use crate::support::mount::Mount;
use crate::support::process::run;
use crate::support::proxy::{Fault, Proxy};
use crate::support::registry::Registry;
use crate::support::{PATIENCE, scratch, within};

/// How long the proxy takes over each request: much longer than anything else here takes.
const DELAY: Duration = Duration::from_millis(1500);

/// `ls -lR` of a model, and how long it took.
fn list(mount: &Mount, below: &str) -> Duration {
    let path = mount.path(below);
    within(PATIENCE, "ls -lR", move || {
        let began = Instant::now();
        run("ls", ["-lR".as_ref(), path.as_os_str()]).ok();
        began.elapsed()
    })
}

#[test]
fn the_first_listing_of_a_model_is_few_requests_deep_and_later_ones_ask_nobody() {
    let registry = Registry::open();
    let model = SampleModel::new(5);
    // Nameless shards: their names are proved by the header of each.
    model.docker_v01(false).publish(&registry, "org/m:v1");
    let proxy = Proxy::start(registry.address());
    let cache = scratch("cache");
    let mount = Mount::start(cache.path(), ["--prefetch", "none"]);
    let below = format!("{}/org/m:v1", proxy.host());
    proxy.always("/v2/", Fault::Delay(DELAY));
    let took = list(&mount, &below);
    let deep = took.as_secs_f64() / DELAY.as_secs_f64();
    let asked: Vec<_> = proxy
        .records()
        .iter()
        .map(|record| format!("{} {} {:?}", record.method, record.path, record.range))
        .collect();
    println!("{deep:.2} requests deep: {asked:#?}");
    assert!(deep < 4.0, "{deep:.2} requests deep: {asked:#?}");

    proxy.settle();
    proxy.reset();
    for script in [
        "ls -lR \"$0\"",
        "find \"$0\" -ls",
        "stat \"$0\"/*",
        "du -a \"$0\"",
        "getfattr -dR \"$0\"",
    ] {
        let path = mount.path(&below);
        within(PATIENCE, script, move || {
            run("bash", ["-c".as_ref(), script.as_ref(), path.as_os_str()]).ok()
        });
    }
    assert_eq!(proxy.records().len(), 0, "the registry was asked again");
    mount.unmount();
}
