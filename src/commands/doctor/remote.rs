//! Whether something can be mounted lazily: its server, credentials, clock, ranges, indexes. In: a source. Out: checks.

use std::time::{Duration, Instant, SystemTime};

use super::Check;
use crate::commands::cli::RegistryArgs;
use crate::http::{HttpOptions, RetryPolicy};
use crate::open::TrustPolicy;
use crate::open::discover::find_indexes;
use crate::quantity::show_time;
use crate::source::registry::{self, BlobPlace, ImageName, Login, PullPolicy, Reference, Registry, RegistryOptions};
use crate::source::{self, Blob, Place, Source};

/// Clocks that differ by less are as good as equal.
const SLIGHT_SKEW: Duration = Duration::from_secs(30);
/// Clocks that differ by more make tokens and certificates fail.
const GREAT_SKEW: Duration = Duration::from_secs(300);

/// Looks at what `source` names; each request is sent once.
pub(super) fn checks(source: &str, args: &RegistryArgs) -> anyhow::Result<Vec<Check>> {
    let http = HttpOptions {
        retry: RetryPolicy::once(),
        ..args.http()
    };
    let options = RegistryOptions {
        http,
        pull: PullPolicy::Always,
        ..args.options()?
    };
    Ok(match Source::parse(source)? {
        Source::Image(ImageName::Registry(reference)) => of_image(&reference, &options, &args.trust()?),
        Source::Url(url) => of_url(&url, &http),
        here @ (Source::Path(_) | Source::Image(ImageName::Layout(_))) => vec![of_local(&here, &options)],
    })
}

fn of_local(source: &Source, options: &RegistryOptions) -> Check {
    let found = match source {
        Source::Image(name) => registry::resolve(name, options).map(|image| format!("{} layers", image.layers.len())),
        _ => source::open(source, &options.http).map(|blob| format!("{} bytes", blob.len)),
    };
    match found {
        Ok(found) => Check::ok("source", found),
        Err(error) => Check::problem("source", error.to_string(), "name another one"),
    }
}

fn of_image(reference: &Reference, options: &RegistryOptions, trust: &TrustPolicy) -> Vec<Check> {
    let mut checks = vec![credentials(reference, options)];
    let began = Instant::now();
    let name = ImageName::Registry(reference.clone());
    let image = match registry::resolve(&name, options) {
        Ok(image) => image,
        Err(error) => {
            let advice = "look at the address, the network (proxy, firewall) and the credentials";
            checks.push(Check::problem("registry", error.to_string(), advice));
            return checks;
        }
    };
    let took = show_time(began.elapsed());
    checks.push(Check::ok(
        "registry",
        format!("{} layers, found in {took}", image.layers.len()),
    ));
    let registry = match Registry::new(reference, options) {
        Ok(registry) => registry,
        Err(error) => {
            checks.push(Check::problem("registry", error.to_string(), "mend the file"));
            return checks;
        }
    };
    checks.push(clock(registry.clock()));
    let first = image.layers.iter().find_map(|layer| match &layer.place {
        BlobPlace::Registry(access) => Some(Blob::of_registry(access.clone())),
        BlobPlace::File(_) => None,
    });
    checks.extend(first.map(|blob| ranges(&blob, &options.http)));
    checks.push(match find_indexes(&registry, &image, None, trust) {
        Err(error) => Check::warning(
            "indexes",
            error.to_string(),
            "without them compressed layers are downloaded to mount",
        ),
        Ok(found) => {
            let (there, all) = (found.iter().flatten().count(), image.layers.len());
            let believed = found.iter().flatten().filter(|found| found.trust.is_some()).count();
            let found = format!("published for {there} of {all} layers");
            if believed < there {
                Check::warning(
                    "indexes",
                    format!(
                        "{found}, and nothing vouches for {} of them: they are not used",
                        there - believed
                    ),
                    "--trust-key FILE believes who signed them, --trust registry whoever may write there",
                )
            } else if there == all {
                Check::ok("indexes", found)
            } else {
                let advice = format!(
                    "`tarblk index push {name}` makes the others; without them those layers may have to come whole"
                );
                Check::warning("indexes", found, advice)
            }
        }
    });
    checks
}

fn credentials(reference: &Reference, options: &RegistryOptions) -> Check {
    let name = "credentials";
    let login = match &options.keyring.given {
        Some(given) => Ok(given.clone()),
        None => options.keyring.login(&reference.host, &reference.repository),
    };
    match login {
        Ok(Login::Anonymous) => Check::ok(name, format!("none for {}", reference.host)),
        Ok(Login::Password { user, .. }) => Check::ok(name, format!("for {} as {user}", reference.host)),
        Ok(Login::Identity(_) | Login::Bearer(_)) => Check::ok(name, format!("a token for {}", reference.host)),
        Err(error) => Check::problem(
            name,
            error.to_string(),
            "mend the file, or name another one with --authfile",
        ),
    }
}

fn of_url(url: &url::Url, http: &HttpOptions) -> Vec<Check> {
    let blob = match source::probe(url, http) {
        Ok(blob) => blob,
        Err(error) => {
            let advice = "look at the address and the network (proxy, firewall)";
            return vec![Check::problem("server", error.to_string(), advice)];
        }
    };
    let mut checks = vec![
        Check::ok("server", format!("{} bytes", blob.len)),
        clock(source::server_clock(url, http)),
        ranges(&blob, http),
    ];
    if let Place::Url(at) = &blob.place {
        checks.push(match &at.validator {
            Some(_) => Check::ok("validator", "the server says whether the layer is still the same"),
            None => Check::warning(
                "validator",
                "the server says neither ETag nor Last-Modified",
                "nothing is kept from one mount to the next; have the server say one of them",
            ),
        });
    }
    checks
}

fn ranges(blob: &Blob, http: &HttpOptions) -> Check {
    let without =
        "without ranges a layer has to come whole, from beginning to end; use a server or proxy that answers them";
    let name = "ranges";
    if !blob.answers_ranges() {
        return Check::problem(name, "the server does not answer them", without);
    }
    match source::has_ranges(blob, http) {
        Ok(true) => Check::ok(name, "answered"),
        Ok(false) => Check::problem(name, "the server does not answer them", without),
        Err(error) => Check::problem(name, error.to_string(), "look at why layers cannot be read"),
    }
}

fn clock(server: Option<SystemTime>) -> Check {
    skew(server.map(|server| {
        let now = SystemTime::now();
        match server.duration_since(now) {
            Ok(ahead) => (ahead, "behind"),
            Err(error) => (error.duration(), "ahead of"),
        }
    }))
}

/// By how much this machine's clock differs from the server's, and to which side.
fn skew(skew: Option<(Duration, &str)>) -> Check {
    let name = "clock";
    let advice = "set this machine's clock (NTP): tokens, signed addresses and certificates are compared with it";
    match skew {
        None => Check::warning(
            name,
            "the server does not say what time it is",
            "nothing, if this machine's clock is right",
        ),
        Some((by, _)) if by < SLIGHT_SKEW => Check::ok(name, "agrees with the server's"),
        Some((by, side)) => {
            let found = format!("{} {side} the server's", show_time(by));
            if by < GREAT_SKEW {
                Check::warning(name, found, advice)
            } else {
                Check::problem(name, found, advice)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Health;
    use super::*;

    #[test]
    fn clocks_may_differ_a_little() {
        let state = |secs| skew(Some((Duration::from_secs(secs), "behind"))).state;
        assert_eq!(
            [0, 29, 31, 301].map(state),
            [Health::Ok, Health::Ok, Health::Warning, Health::Problem]
        );
        let now = SystemTime::now();
        assert!(
            clock(Some(now + Duration::from_secs(3600)))
                .found
                .ends_with("behind the server's")
        );
        assert!(
            clock(Some(now - Duration::from_secs(3600)))
                .found
                .ends_with("ahead of the server's")
        );
    }
}
