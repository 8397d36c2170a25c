//! Platforms: the machines that images are for. In: what people and documents call them. Out: names as Go has them, and how well
//! what is for one of them serves another. Knows this machine's processor; knows no documents.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::lenient::null_is_empty;

/// The distance of a platform of another name that a processor runs too.
const FOREIGN: u32 = 1 << 16;

/// `os/arch[/variant]`, as Go names them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// `linux`; empty where nothing is said.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub os: String,
    /// `amd64`, `arm64`, …; empty where nothing is said.
    #[serde(default, deserialize_with = "null_is_empty")]
    pub architecture: String,
    /// `v7`, `v8`, …
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

impl Platform {
    /// Linux on this machine's processor.
    #[must_use]
    pub fn here() -> Self {
        let (architecture, variant) = match std::env::consts::ARCH {
            "x86_64" => ("amd64", None),
            "x86" => ("386", None),
            "aarch64" => ("arm64", None),
            "arm" => ("arm", Some("v7")),
            "powerpc64" if cfg!(target_endian = "little") => ("ppc64le", None),
            "loongarch64" => ("loong64", None),
            other => (other, None),
        };
        Self {
            os: "linux".to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.map(str::to_owned),
        }
    }

    /// The same with the level of this processor, where images are made for several: what it runs beside what is meant by default.
    pub(super) fn here_at_best() -> Self {
        #[cfg(target_arch = "x86_64")]
        return Self {
            variant: level_of_processor().map(str::to_owned),
            ..Self::here()
        };
        #[cfg(not(target_arch = "x86_64"))]
        Self::here()
    }

    /// The names that Go has for what others call otherwise (containerd's platforms package, "Normalize").
    fn normal(&self) -> Self {
        let os = match self.os.to_ascii_lowercase().as_str() {
            "" => "linux".to_owned(),
            "macos" => "darwin".to_owned(),
            other => other.to_owned(),
        };
        let said = self.variant.as_deref().unwrap_or_default().to_ascii_lowercase();
        let (architecture, variant) = match self.architecture.to_ascii_lowercase().as_str() {
            "x86_64" | "x86-64" => ("amd64".to_owned(), said),
            "i386" => ("386".to_owned(), String::new()),
            "aarch64" => ("arm64".to_owned(), said),
            "armhf" => ("arm".to_owned(), "v7".to_owned()),
            "armel" => ("arm".to_owned(), "v6".to_owned()),
            other => (other.to_owned(), said),
        };
        Self {
            os,
            architecture,
            variant: Some(variant).filter(|variant| !variant.is_empty()),
        }
    }

    /// Whether nothing is said of the processor: then the image's configuration may say more, or it is for any.
    pub(super) fn is_unsaid(&self) -> bool {
        self.architecture.is_empty()
    }

    /// How well `offered` serves a machine that is this; less is better, none is not at all.
    pub(super) fn distance(&self, offered: &Self) -> Option<u32> {
        let (wanted, offered) = (self.normal(), offered.normal());
        if wanted.os != offered.os {
            return None;
        }
        // What is meant where nothing is said (containerd's defaults).
        let usual = match wanted.architecture.as_str() {
            "arm64" => "v8",
            "arm" => "v7",
            "amd64" => "v1",
            _ => "",
        };
        let level = |platform: &Self| {
            let variant = platform.variant.as_deref().unwrap_or(usual);
            match variant.strip_prefix('v').unwrap_or(variant).parse::<u32>() {
                Ok(level) => Ok(level),
                Err(_) => Err(variant.to_owned()),
            }
        };
        match (wanted.architecture.as_str(), offered.architecture.as_str()) {
            (wanted_for, offered_for) if wanted_for == offered_for => match (level(&wanted), level(&offered)) {
                (Ok(wanted), Ok(offered)) => wanted.checked_sub(offered),
                (wanted, offered) => (wanted == offered).then_some(0),
            },
            // What these processors run too, when there is nothing better.
            ("amd64", "386") => Some(FOREIGN),
            ("arm64", "arm") => {
                let arm = Self {
                    architecture: "arm".to_owned(),
                    variant: Some("v8".to_owned()),
                    ..wanted
                };
                arm.distance(&offered).map(|distance| FOREIGN.saturating_add(distance))
            }
            _ => None,
        }
    }
}

/// The level of an x86-64 processor (System V ABI, "Micro-Architecture Levels").
#[cfg(target_arch = "x86_64")]
fn level_of_processor() -> Option<&'static str> {
    use std::arch::is_x86_feature_detected as has;
    let v2 = has!("cmpxchg16b") && has!("popcnt") && has!("sse4.2") && has!("ssse3");
    let v3 = v2 && has!("avx2") && has!("bmi1") && has!("bmi2") && has!("f16c") && has!("fma") && has!("lzcnt");
    let v4 = v3 && has!("avx512f") && has!("avx512bw") && has!("avx512cd") && has!("avx512dq") && has!("avx512vl");
    [(v4, "v4"), (v3, "v3"), (v2, "v2")]
        .into_iter()
        .find_map(|(has, level)| has.then_some(level))
}

impl FromStr for Platform {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = text.split('/').map(str::to_owned);
        let (os, architecture, variant) = (parts.next(), parts.next(), parts.next());
        let word =
            |part: &str| !part.is_empty() && part.bytes().all(|c| c.is_ascii_alphanumeric() || b"._-".contains(&c));
        match (os, architecture, variant, parts.next()) {
            (Some(os), Some(architecture), variant, None)
                if word(&os) && word(&architecture) && variant.as_deref().is_none_or(word) =>
            {
                let named = Self {
                    os,
                    architecture,
                    variant,
                };
                Ok(named.normal())
            }
            _ => Err("a platform is written os/arch or os/arch/variant, as linux/amd64 or linux/arm/v7".to_owned()),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(variant) => write!(f, "/{variant}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_and_written() {
        let read = |text: &str| text.parse::<Platform>().map(|platform| platform.to_string());
        for (text, written) in [
            ("linux/amd64", "linux/amd64"),
            ("Linux/x86_64", "linux/amd64"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/armhf", "linux/arm/v7"),
            ("linux/arm/V6", "linux/arm/v6"),
            ("macos/arm64", "darwin/arm64"),
        ] {
            assert_eq!(read(text).as_deref(), Ok(written), "{text}");
        }
        for text in [
            "",
            "linux",
            "linux/",
            "/amd64",
            "a/b/c/d",
            "linux/amd64/",
            "linux/am d64",
        ] {
            assert!(read(text).is_err(), "{text}");
        }
    }
}
