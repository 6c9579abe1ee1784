//! The certificates of the planes: whether they can be used, and until when.

use pointsman_server::Validity;

use crate::causes::told;
use crate::config::Config;

use super::report::Report;

/// Left before a certificate expires, below which somebody should look: an automatic renewal comes earlier.
const WARNING_S: u64 = 14 * 24 * 3_600;

pub(super) fn examine(config: &Config, now_s: u64, report: &mut Report<'_>) -> anyhow::Result<()> {
    for (name, tls) in [("data", &config.server.tls), ("admin", &config.admin.tls)] {
        match tls.load() {
            Ok(None) => {}
            Ok(Some(certificate)) => {
                let left = certificate.valid.map(|valid| left(valid, now_s));
                tell((name, &tls.cert_file.display().to_string()), left, report)?;
            }
            Err(error) => {
                let remedy = "put files in their place that the host may read (docs/tls.md)";
                report.fault("tls", name, told(anyhow::Error::from(error).chain()), remedy)?;
            }
        }
    }
    Ok(())
}

fn tell((name, file): (&str, &str), left: Option<Left>, report: &mut Report<'_>) -> anyhow::Result<()> {
    match left {
        None => report.good("tls", name, format!("{file} can be used")),
        Some(Left::NotYet { days, expires }) => {
            let found =
                format!("{file} expires in {expires} days and is not valid yet, for {days} days: clients refuse it");
            report.fault("tls", name, found, "use one that is valid, or correct the clock of this machine")
        }
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
    /// It becomes valid.
    NotYet {
        days: u64,
        /// Days to the end: of a chain that may come before.
        expires: u64,
    },
    /// Somebody should look.
    Little {
        days: u64,
    },
    Enough {
        days: u64,
    },
}

pub(super) fn left(Validity { from_s, until_s }: Validity, now_s: u64) -> Left {
    const DAY: u64 = 24 * 3_600;
    let days = until_s.saturating_sub(now_s) / DAY;
    match until_s.checked_sub(now_s) {
        None => Left::Nothing,
        Some(_) if from_s > now_s => Left::NotYet { days: (from_s - now_s).div_ceil(DAY), expires: days },
        Some(left_s) if left_s < WARNING_S => Left::Little { days },
        Some(_) => Left::Enough { days },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_weeks_before_its_end_somebody_should_look() {
        const DAY: u64 = 24 * 3_600;
        for (from_s, until_s, expect) in [
            (0, 99 * DAY, Left::Nothing),
            (0, 100 * DAY, Left::Little { days: 0 }),
            (100 * DAY, 114 * DAY - 1, Left::Little { days: 13 }),
            (100 * DAY, 114 * DAY, Left::Enough { days: 14 }),
            (100 * DAY + 1, 114 * DAY, Left::NotYet { days: 1, expires: 14 }),
            (102 * DAY, 103 * DAY, Left::NotYet { days: 2, expires: 3 }),
            (102 * DAY, 101 * DAY, Left::NotYet { days: 2, expires: 1 }),
        ] {
            assert_eq!(left(Validity { from_s, until_s }, 100 * DAY), expect, "{from_s} to {until_s}");
        }
    }
}
