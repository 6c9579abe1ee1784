//! The certificates of the planes: whether they can be used, and until when.

use crate::config::Config;
use crate::tls::TlsSection;

use super::report::Report;

/// Left before a certificate expires, below which somebody should look: an automatic renewal comes earlier.
const WARNING_S: u64 = 14 * 24 * 3_600;

pub(super) fn examine(config: &Config, now_s: u64, report: &mut Report<'_>) -> anyhow::Result<()> {
    for (name, tls) in [("data", &config.server.tls), ("admin", &config.admin.tls)] {
        match tls.load() {
            Ok(None) => {}
            Ok(Some(_)) => valid(name, tls, now_s, report)?,
            Err(error) => {
                let remedy = "put files in their place that the host may read (docs/tls.md)";
                report.fault("tls", name, chain(&error), remedy)?;
            }
        }
    }
    Ok(())
}

fn valid(name: &str, tls: &TlsSection, now_s: u64, report: &mut Report<'_>) -> anyhow::Result<()> {
    let file = tls.cert_file.display();
    match tls.expiry()?.map(|end_s| left(end_s, now_s)) {
        None => report.good("tls", name, format!("{file} can be used")),
        Some(Left::Nothing) => {
            report.fault("tls", name, format!("{file} has expired: clients refuse it"), "renew it, and send SIGHUP")
        }
        Some(Left::Little { days }) => {
            report.warn("tls", name, format!("{file} expires in {days} days"), "renew it, and send SIGHUP")
        }
        Some(Left::Enough { days }) => report.good("tls", name, format!("{file} is valid for {days} days")),
    }
}

/// How long something is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Left {
    Nothing,
    /// Somebody should look.
    Little {
        days: u64,
    },
    Enough {
        days: u64,
    },
}

pub(super) fn left(end_s: u64, now_s: u64) -> Left {
    let days = end_s.saturating_sub(now_s) / (24 * 3_600);
    match end_s.checked_sub(now_s) {
        None => Left::Nothing,
        Some(left_s) if left_s < WARNING_S => Left::Little { days },
        Some(_) => Left::Enough { days },
    }
}

/// An error with what caused it.
fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_weeks_before_its_end_somebody_should_look() {
        const DAY: u64 = 24 * 3_600;
        for (end_s, expect) in [
            (99 * DAY, Left::Nothing),
            (100 * DAY, Left::Little { days: 0 }),
            (114 * DAY - 1, Left::Little { days: 13 }),
            (114 * DAY, Left::Enough { days: 14 }),
        ] {
            assert_eq!(left(end_s, 100 * DAY), expect, "{end_s}");
        }
    }
}
