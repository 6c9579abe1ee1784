//! `pointsman device ...`: what the devices of a running host have, and what may be taken back of it.

use std::io::Write;

use serde_json::{Value, json};

use crate::cli::DeviceCommand;
use crate::client::{Admin, print, rows, segment, text};

const DEVICES: &str = "/admin/v1/devices";

/// Runs one command; what it prints goes to `out`.
///
/// # Errors
/// The host cannot be reached or refuses; the message is the host's own.
pub(crate) fn run(command: DeviceCommand, out: &mut dyn Write) -> anyhow::Result<()> {
    match command {
        DeviceCommand::List { at } => print(out, &at, &Admin::new(at.clone()).get(DEVICES)?, |answer| {
            let devices = rows(answer).iter().map(lines).collect::<Vec<_>>();
            format!("{HEAD}\n{}", devices.join("\n"))
        }),
        DeviceCommand::ClearCache { device, at } => {
            let path = format!("{DEVICES}/{}/prefix-cache", segment(&device));
            let answer = Admin::new(at.clone()).send("DELETE", &path, Vec::new(), "")?;
            print(out, &at, &answer, |answer| {
                let cleared = |replica: &Value| format!("{}: {} blocks", text(replica, "name"), replica["kv_blocks"]);
                rows(answer).iter().map(cleared).collect::<Vec<_>>().join("\n")
            })
        }
        DeviceCommand::KvPools { device, bound, at } => {
            let path = format!("{DEVICES}/{}/kv-pools", segment(&device));
            let body = json!({ "mib": bound.mib }).to_string().into_bytes();
            let answer = Admin::new(at.clone()).send("PUT", &path, body, "application/json")?;
            print(out, &at, &answer, |device| format!("{HEAD}\n{}", lines(device)))
        }
    }
}

const HEAD: &str = "NAME (MiB)       STATE      WEIGHTS       KV   GRAPHS    OTHER     FREE    TOTAL     BUSY";

/// A device and its replicas.
fn lines(device: &Value) -> String {
    let memory = &device["memory"];
    let mib = |bytes: Option<u64>| bytes.map_or("-".to_owned(), |bytes| (bytes >> 20).to_string());
    let of = |owner: &str| memory[owner].as_u64();
    let other = of("workspace").map(|bytes| bytes + of("drafts").unwrap_or(0));
    let busy = device["utilization"].as_f64().map_or("-".to_owned(), |busy| format!("{:.0} %", 100.0 * busy));
    let (name, state) = (text(device, "name"), text(device, "state"));
    let (weights, kv, graphs) = (mib(of("weights")), mib(of("kv")), mib(of("graphs")));
    let (other, free, total) = (mib(other), mib(of("free")), mib(of("total")));
    let mut all = vec![format!(
        "{name:<16} {state:<9} {weights:>8} {kv:>8} {graphs:>8} {other:>8} {free:>8} {total:>8}     {busy:>5}"
    )];
    let bound = device["kv_pool_bound"].as_u64();
    all.extend(bound.map(|bytes| format!("  KV pools are bounded to {} MiB each", bytes >> 20)));
    let replicas = device["replicas"].as_array().map_or(&[][..], Vec::as_slice);
    all.extend(replicas.iter().map(|replica| {
        let [blocks, most, free, cached] =
            ["kv_blocks", "kv_most_blocks", "kv_free_blocks", "kv_cached_blocks"].map(|count| &replica[count]);
        let (name, running, waiting) = (text(replica, "name"), &replica["running"], &replica["waiting"]);
        let blocks = if blocks == most { blocks.to_string() } else { format!("{blocks} of {most}") };
        format!("  {name:<34} {blocks} KV blocks, {free} free ({cached} with a prefix); {running} run, {waiting} wait")
    }));
    all.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_a_line_and_one_for_each_replica() {
        let device = json!({
            "name": "cuda:0", "state": "up", "utilization": 0.254, "kv_pool_bound": 8_589_934_592_u64,
            "memory": {"weights": 16_060_000_000_u64, "kv": 8_589_934_592_u64, "workspace": 500_000_000, "graphs": 16_777_216,
                "free": 900_000_000, "total": 25_700_000_000_u64},
            "replicas": [{"name": "m:f16@cuda:0", "kv_blocks": 4096, "kv_most_blocks": 5000, "kv_free_blocks": 4000,
                "kv_cached_blocks": 7, "running": 3, "waiting": 0}],
        });
        let expect = [
            "NAME (MiB)       STATE      WEIGHTS       KV   GRAPHS    OTHER     FREE    TOTAL     BUSY",
            "cuda:0           up           15316     8192       16      476      858    24509      25 %",
            "  KV pools are bounded to 8192 MiB each",
            "  m:f16@cuda:0                       4096 of 5000 KV blocks, 4000 free (7 with a prefix); 3 run, 0 wait",
        ];
        assert_eq!(format!("{HEAD}\n{}", lines(&device)), expect.join("\n"));
        let cpu =
            json!({"name": "cpu", "state": "up", "memory": {"weights": 0, "kv": 0, "workspace": 0}, "replicas": []});
        assert!(
            lines(&cpu).starts_with("cpu              up               0        0        -        0        -        -")
        );
    }
}
